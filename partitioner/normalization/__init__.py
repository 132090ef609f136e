"""Bring a model to the normal form that later passes expect, without changing what it computes.

This covers opsets, precisions, quantisation, parameters, and the implicit behaviour of operators.
Gradients and cuts do not belong here.  It may use the gate, inference, graphs and the native room.
"""
