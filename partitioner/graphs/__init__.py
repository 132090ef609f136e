"""Building and walking graphs: nodes, names, bodies, what depends on what, how they are written.

What a model means, whether it can be trained and where it is cut is not known here.  It uses no
other room.
"""
