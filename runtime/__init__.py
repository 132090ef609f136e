"""The runtime: trains and runs the parts of a bundle, and moves tensors between the two parties."""
