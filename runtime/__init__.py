"""The runtime, which trains and runs a bundle's parts, and moves tensors between the parties."""
