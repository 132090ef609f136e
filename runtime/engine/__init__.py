"""The engine, which runs a party's stages with ONNX Runtime, and estimates the memory of tasks.

This is the only package that imports ONNX Runtime.  It knows nothing about connections or clients'
sessions.  Modules here may import the packages ``gate`` and ``wire``.
"""
