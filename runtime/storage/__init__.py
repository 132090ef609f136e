"""What is kept on disk: checkpoints, on both sides, and a server's archive of its sessions.

``checkpoints.py`` writes both sides' checkpoints.  Every file appears completely or not at all.
Which session is whose is decided by the callers.  It uses no other room.
"""
