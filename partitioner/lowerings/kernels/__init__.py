"""Kernels: choose the form of a node that ONNX Runtime computes fastest.

Each module replaces nodes of one kind by others with the same result, up to rounding.  The choice
depends on the node alone, never on the cut or on the party that runs it: otherwise, split training
would not have the bits of unsplit training.  ``benchmarks/NOTES.md`` has the figures.
"""
