"""Worker processes, which run the stages of untrusted clients.

This package contains the server's side, the worker's side, and the messages and shared memory
between them.  It does not decide who may have a session.  Modules here may import the packages
``engine`` and ``gate``.
"""
