"""Write the operators of ONNX Runtime's optimizers in standard operators again.

A module here holds the formulas of one family of fused operators; :mod:`replacements` has the table
of them and applies it.  The formulas are those of ContribOperators.md of ONNX Runtime and of its
kernels.  Modules here may import ``gate``, ``inference`` and ``graphs``.
"""
