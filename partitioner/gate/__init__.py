"""The gate: the checks that every model must pass before any other code reads it.

It checks names, operators, tensors, sizes and form on the protobuf messages themselves.  It does
not change what the model computes.  It only turns ZipMap, whose dictionaries onnx-ir cannot hold,
into a tensor, and makes negative dimensions unknown; the caller's own file or object stays as it
is.
``ml_operators.py`` lists the operators of ai.onnx.ml that are accepted, and has the pass that later
rewrites them as standard operators.  This package may import graphs, inference and native.
"""
