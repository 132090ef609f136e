"""Estimate how much memory each party's part of a training step needs, without running it.

What a model's cuts send is in ``inspections.py``, above; what a server reserves for a task is the
runtime's own estimate, which goes through the graphs node by node.
"""
