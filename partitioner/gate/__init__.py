"""The gate: every model passes it before anything else sees it.

Names, operators, tensors, sizes and form are checked on the messages themselves.  What the model
computes is not changed.  Only ZipMap, whose dictionaries onnx-ir cannot hold, becomes a tensor, and
negative dimensions become unknown; the caller's own file or object stays as it is.
``ml_operators.py`` lists the operators of ai.onnx.ml that are accepted, and has the pass that
writes them in standard ones after the gate.  The gate may use graphs, inference and the native
room.
"""
