"""Losses, gradients of the whole model, and optimizer updates, built as graphs.

A model is differentiated once, as a whole, before it is cut.  This package may import rewrites,
normalization and the packages that these import.  It does not depend on where the cut is.
"""
