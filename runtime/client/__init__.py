"""The client: data in batches, training loops, checkpoints, histories, and the public ``Client``.

The shell on the device's side.  It may use the channels, the engine, the storage and the wire; the
server's rooms are never imported, so that a device installs none of it.
"""
