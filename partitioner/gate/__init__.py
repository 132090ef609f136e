"""The gate: every model passes it before anything else sees it.

Names, operators, tensors, sizes and form are checked on the messages themselves.  It changes
nothing, and may use graphs, inference and the native room.
"""
