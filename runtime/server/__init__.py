"""The server: connections become sessions, messages become tasks, replies go back.

The shell on top of every other room but the client's two.  Limits on connections belong to the
edge, running stages to the engine and the workers.
"""
