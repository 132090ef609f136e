"""Keep the gradients of a network in its export, and compare them with the network's.

What stops gradients is written into the model, so that ``cut`` can be told of it.  This package
does not compare results, and uses the partitioner to differentiate.
"""
