"""Tell constants that a network may have learned from those that are fixed in most networks.

:mod:`numbers` judges the numbers of a tensor, and :mod:`kept` finds the constants of a graph.
Modules in this package may import ``parameters``, ``weights`` and what these may import.
"""
