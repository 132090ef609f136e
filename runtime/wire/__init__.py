"""What both sides of a connection share: the protocol, fragments, close codes, TLS, validation.

The messages themselves, greetings among them, are in ``splitonnx/messages.py``.  What only a
server or only a client does belongs to the edge, the server or the channels.  It uses no other
room.
"""
