"""Many rows of a file: lines in, lines out, by the threads of one process or by the workers of a Ray cluster."""
