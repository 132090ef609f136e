"""Report on a model before it is cut: whether it can be trained, where it can be cut, why not.

The reports do not change the model.  This package may import every other package.
"""
