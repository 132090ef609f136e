"""Files on disk: both sides' checkpoints, and a server's archive of its sessions.

``checkpoints.py`` writes the checkpoints of both sides.  Every file appears completely or not at
all.  The callers decide to which owner a session belongs.  This package imports none of the
runtime's other packages.
"""
