"""Tools for building, reading, writing and traversing graphs.

They do not depend on what a model computes, whether it can be trained or where it is cut.  Modules
here import no other package of the partitioner.
"""
