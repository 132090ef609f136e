"""A bundle in, trained weights out: runs stages when their inputs are there, moves tensors."""
