"""Convert a model to the normal form that later passes expect, without changing its results.

The modules handle opsets, precisions, quantisation, parameters, and implicit behaviour of
operators.  They deal neither with gradients nor with cutting the model into parts.  Modules in this
package may import the packages gate, graphs, inference and native.
"""
