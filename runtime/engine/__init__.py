"""The engine: runs stages with ONNX Runtime, keeps a party's tasks, and estimates their memory.

This is the only package that imports ONNX Runtime.  It knows nothing about connections or clients'
sessions.  Modules here may import the gate.
"""
