"""The client: datasets, training loops, checkpoints, histories, and the public ``Client``.

This package runs on the client's device.  It may import the channels, the engine, the storage, the
wire and ``limits.py``, which measures the machine's memory, but never the server's packages, so
that a device does not load what only they need.
"""
