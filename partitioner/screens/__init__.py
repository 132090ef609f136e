"""What the gate checks of a model before anything else sees it; see :mod:`gates`.

The modules work on protobuf messages and believe nothing that these say of themselves.  Each
walks with bounds: on nodes (functions expanded), on nesting, on ranks, on the length of names.
"""
