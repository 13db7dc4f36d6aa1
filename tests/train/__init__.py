"""Training on the build side."""
