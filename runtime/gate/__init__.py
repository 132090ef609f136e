"""The gate, which decides from a graph's bytes whether ONNX Runtime may load the graph.

This package can also list the nodes of a graph that it accepted.  It has its own parser for
Protocol Buffers.  It knows ONNX's messages and the operators that bundles use, but it imports
neither onnx nor ONNX Runtime, and runs nothing.  Its modules import none of the runtime's other
packages.
"""
