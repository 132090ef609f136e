"""The network edge of a server: sockets, HTTP, tokens, and limits on connections.

This package decides who may connect, how much and how fast clients may send, and how HTTP requests
are answered.  The server package handles the contents of messages, sessions and stages.  Modules
here may import ``runtime.wire`` and ``limits.py``.
"""
