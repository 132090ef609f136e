"""A client's connection to its server: how it connects, who it says it is, how it reconnects.

``channels.py`` sends the greeting, ``retries.py`` has the waits before a reconnect.

It carries messages of a task and knows when one is answered; what is in them and when to train
belongs to the client.  It may use the wire.
"""
