"""Runs stages: ONNX Runtime's sessions, a party's tasks, and estimates of the memory they take.

The one room that imports ONNX Runtime.  Connections, sessions of clients and files on disk are not
known here.  It may use the gate.
"""
