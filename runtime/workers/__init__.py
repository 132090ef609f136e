"""Worker processes: stages of clients that nobody trusts run in processes of their own.

Both ends are here, the server's and the worker's, with the messages and the memory between them.
Who may have a session is not decided here.  It may use the engine and the gate.
"""
