"""Run native code of onnx and ONNX Runtime in a separate process.

The process protects the caller: even a malformed model cannot crash the caller's own process.  The
functions that run in the separate process take and return models as bytes.  This package imports no
other package of the partitioner.
"""
