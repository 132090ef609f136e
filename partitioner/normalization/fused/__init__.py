"""Write the fused operators of ONNX Runtime's optimizers as standard operators again.

Each family of fused operators has a module with its formulas, and :mod:`replacements` applies them.
The formulas follow ONNX Runtime's documentation (ContribOperators.md) and its kernels.  Modules in
this package may import ``gate``, ``inference`` and ``graphs``.
"""
