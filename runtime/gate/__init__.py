"""The gate: decides from a graph's bytes whether ONNX Runtime may load it.

It parses Protocol Buffers by hand and knows ONNX's messages and the operators of a bundle, but it
imports neither onnx nor ONNX Runtime and runs nothing.  It imports none of the runtime's other
packages.
"""
