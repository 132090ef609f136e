"""Brings a model to the one form that the rest works on, without a change of what it computes.

Opsets, precisions, quantisation, parameters, and what operators leave implicit.  It knows neither
gradients nor cuts.  It may use the gate, inference, graphs
and the native room.
"""
