"""The gate, which decides from a graph's bytes whether ONNX Runtime may load the graph.

It has its own parser for Protocol Buffers.  It knows ONNX's messages and the operators that bundles
use, but it imports neither onnx nor ONNX Runtime, and runs nothing.  Modules here import none of
the runtime's other packages.
"""
