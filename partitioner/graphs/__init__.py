"""Build, read, write and walk graphs: nodes, names, bodies and dependencies.

This package does not depend on what a model computes, whether it can be trained or where it is cut.
It imports no other package of the partitioner.
"""
