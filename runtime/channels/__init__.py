"""A client's connection to its server: connecting, authentication and reconnecting.

``channels.py`` sends the greeting, ``retries.py`` computes the waits before a reconnect.

This package sends and receives a task's messages and knows when a message is answered.  What the
messages contain and when to train is decided by the client package.  It may import the wire.
"""
