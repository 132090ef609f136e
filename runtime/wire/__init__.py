"""What both sides of a connection share: the protocol, fragments, close codes, TLS and validation.

The messages themselves, including greetings, are in ``splitonnx/messages.py``.  Code that only a
server or only a client needs belongs to the edge, the server or the channels.  This package
imports none of the other packages of the runtime.
"""
