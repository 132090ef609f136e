"""The passes that prepare a model for cutting, and what each of them requires and ensures.

The passes are implemented in the packages normalization, inference and rewrites.  They do not
depend on where the model is cut.
"""
