"""Run stages: ONNX Runtime's sessions, a party's tasks, and estimates of their memory.

This is the only package that imports ONNX Runtime.  It knows no connections, no clients' sessions
and no files on disk.  It may import the gate.
"""
