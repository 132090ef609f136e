"""Metrics of an evaluation, such as F1 and AUC, as scikit-learn defines them.

This package computes numbers from predictions and labels, which the client has.  Modules here use
numpy and the values in ``splitonnx``; they never run a model and never send anything.
"""
