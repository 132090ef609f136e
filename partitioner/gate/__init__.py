"""The gate: the checks that every model must pass before any other code uses it.

The gate checks a model's names, operators, attributes, types and tensors directly in the protobuf
messages.  It also makes a few changes, always in its own copy of the model:

- it applies the changes to the inputs that the caller asks for;
- it replaces the dictionaries of ZipMap, which onnx-ir does not support, with tensors;
- it moves layer normalizations to ONNX Runtime's domain if the model's opset lacks them;
- it marks negative dimensions as unknown.

The caller's file or object is not changed.

Modules here may import ``graphs``, ``inference`` and ``native``.
"""
