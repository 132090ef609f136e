"""The engine: runs a party's stages and tasks with ONNX Runtime, and estimates their memory.

This is the only package that imports ONNX Runtime.  It knows nothing about connections or clients'
sessions.  Modules here may import the package ``gate``.
"""
