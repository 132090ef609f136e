"""Give an exported model the same gradients as the network, and compare the gradients.

If the network stops gradients at a tensor, the exported model contains this tensor under a name
that can be passed to ``cut``.  This package uses the partitioner to differentiate the model.  It
does not compare results.
"""
