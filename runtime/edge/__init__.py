"""The edge of a server: sockets, HTTP, tokens and connection limits, before messages are read.

This package decides who may connect, how much and how fast clients may send, and how HTTP requests
are answered.  The contents of messages, sessions and stages belong to the server package.  It may
import the wire and ``limits.py``.
"""
