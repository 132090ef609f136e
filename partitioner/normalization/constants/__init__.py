"""Tell constants that a network may have learned from those that are fixed in most networks.

:mod:`numbers` judges the numbers of a tensor, :mod:`kept` finds the constants of a graph, and
:mod:`structures` the tensors that give themselves away by the nodes that read them.
Modules in this package may import ``parameters``, ``weights`` and what these may import.
"""
