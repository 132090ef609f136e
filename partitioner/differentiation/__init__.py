"""Build losses, gradients and optimizer updates as graphs.

The complete model is differentiated once, before it is split between the parties, so the modules
here do not depend on where the cut is.  They may import ``rewrites``, ``normalization``, and the
packages that these two import.
"""
