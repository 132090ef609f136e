"""Worker processes: separate processes that run the stages of untrusted clients.

This package has both ends, the server's and the worker's, with the messages and the shared memory
between them.  It does not decide who may have a session.  It may import the engine and the gate.
"""
