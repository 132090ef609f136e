"""Bytes of a graph in, a verdict out: what a stage's graph may hold before ONNX Runtime sees it.

It reads Protocol Buffers by hand and knows ONNX's messages and the operators of a bundle, but it
imports neither onnx nor ONNX Runtime and runs nothing.  It uses no other room.
"""
