"""Native code of onnx and ONNX Runtime, behind functions of bytes, in a process of its own.

No model, however it was made, can end the caller's process.  It uses no other room.
"""
