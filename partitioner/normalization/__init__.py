"""Convert a model to the normal form that later passes expect, without changing its results.

The modules handle opsets, precisions, quantisation, parameters, and implicit behaviour of
operators.  Gradients and cuts do not belong here.  Modules in this package may import the packages
gate, graphs, inference and native.
"""
