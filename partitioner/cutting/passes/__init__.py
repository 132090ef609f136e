"""The passes that prepare a model for its cut: what each requires, and what it ensures.

What a pass does in detail is in normalization, inference and the rewrites.  It knows no cut.
"""
