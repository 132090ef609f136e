"""The edge of a server: sockets, HTTP, tokens and limits, before a message is looked at.

Who may connect, how much and how fast, and what is answered in HTTP.  What messages say, sessions
and stages belong to the server.  It may use the wire and ``limits.py``.
"""
