"""Random checkpoints with the oddities of real ones, and whether edgelm generates from each what transformers does.

`python -m tests.against_transformers.combinations --count 300 --seed 1` tries 300 of them, and prints how many were
equal, how many were refused as they should be, and a line for each of the others.
"""
