"""A client's connection to its server: connecting, authenticating and reconnecting.

This package sends and receives the messages of a task, such as a training step.  ``channels.py``
sends the greeting (the first message of a connection), and ``retries.py`` computes how long to wait
before reconnecting.  ``queries`` asks a server over plain HTTP, without a session.
``asynchronous`` connects on an event loop.  The ``client`` package decides what the messages
contain and when to train.  Modules here may import ``runtime.wire``.
"""
