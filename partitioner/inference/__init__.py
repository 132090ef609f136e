"""Infer what is known of a model before any data arrives: shapes, types, constants, control flow.

The parts work together: rules compute shapes, constants are folded, and branches and loops that are
known in advance are written out.  This package may import graphs and native.
"""
