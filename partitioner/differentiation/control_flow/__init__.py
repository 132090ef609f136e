"""Differentiate Scan, Loop and If nodes, which onnxruntime-training cannot.

:mod:`obstacles` says which of these nodes cannot be differentiated here either.  The modules may
import the modules beside this package that call the gradient builder, but not :mod:`gradients`,
which differentiates a whole model.
"""
