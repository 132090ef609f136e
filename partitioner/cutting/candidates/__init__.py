"""List where a graph can be cut: at single tensors, and at pairs of tensors for a U-shaped cut.

:func:`cuts.divide` defines which cuts are legal.  These modules find the legal cuts without trying
every cut.
"""
