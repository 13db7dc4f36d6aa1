"""A decoder's weights as arrays, read from each family's checkpoints, and the function that they compute."""
