"""Run native code of onnx and ONNX Runtime in a separate process.

No model, however it was made, can then crash the caller's process.  The functions that run in this
process take and return models as bytes.  This package imports no other package of the partitioner.
"""
