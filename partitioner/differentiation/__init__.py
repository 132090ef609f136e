"""Losses, gradients of the whole model, and the optimizers' updates, as graphs.

A model is differentiated once and whole, before it is cut.  It may use rewrites, normalization and
what is below them; where the cut is, it does not know.
"""
