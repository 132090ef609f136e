"""List the pairs of tensors at which a model can be cut in a U-shape, and the costs of each pair.

The search itself is in ``cutting/candidates/``.
"""
