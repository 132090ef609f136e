"""Files on disk: the checkpoints of both parties, and a server's archive of its sessions.

Every file is written atomically.  The callers decide which owner a session belongs to.  Modules
here import none of the runtime's other packages.
"""
