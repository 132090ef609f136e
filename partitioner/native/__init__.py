"""Run native code of onnx and ONNX Runtime in a separate process, behind functions of bytes.

So no model, however it was made, can crash the caller's process.  This package imports no other
package of the partitioner.
"""
