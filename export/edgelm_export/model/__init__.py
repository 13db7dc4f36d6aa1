"""An architecture's weights as plain arrays, and the function they compute."""
