"""Call onnxruntime-training's gradient builder, and keep from it what it gets wrong.

The modules here know nothing of losses, bodies or optimizers.  :mod:`gradients` and
:mod:`control_flow` use them.
"""
