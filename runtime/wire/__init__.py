"""What both sides of a connection share: the protocol, fragments, close codes, TLS, validation.

Whatever only a server or only a client does belongs to the edge, the server or the channels.  It
uses no other room.
"""
