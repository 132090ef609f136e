"""The gate, which decides from a graph's bytes whether ONNX Runtime may load the graph.

The nodes of a graph that may be loaded can be read here as well.

It has its own parser for Protocol Buffers.  It knows ONNX's messages and the operators that bundles
use, but it imports neither onnx nor ONNX Runtime, and runs nothing.  Modules here import none of
the runtime's other packages.
"""
