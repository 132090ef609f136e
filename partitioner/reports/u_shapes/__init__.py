"""List the pairs of tensors at which a model can be cut in a U-shape, with what each pair costs.

The search itself is in ``cutting/candidates/``.
"""
