"""Call onnxruntime-training's gradient builder, and keep from it what it gets wrong.

The modules here know nothing of losses, Scans or optimizers.  :mod:`gradients` and :mod:`scans` use
them.
"""
