"""What is kept on disk: checkpoints, on both sides, and a server's archive of its sessions.

Every file appears whole or not at all.  Which session is whose is decided by those who ask.  It
uses no other room.
"""
