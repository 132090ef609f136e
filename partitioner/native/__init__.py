"""Run native code of onnx and ONNX Runtime in a separate process.

Even a malformed model can then not crash the caller's process.  The functions that run in the
separate process take and return models as bytes.  This package imports no other package of the
partitioner.
"""
