"""The client: data in batches, training loops, checkpoints, histories, and the public ``Client``.

The shell on the device's side.  It may use the channels, the engine, the storage, the wire and
``limits.py``, which measures the machine's memory.  It never imports the server's rooms, so that a
device does not load what only they need.
"""
