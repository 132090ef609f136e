"""Report on a model before it is cut: whether it can be trained, and where it can be cut.

The reports do not change the model.  Modules here may import all other packages of the partitioner.
"""
