"""Training steps of many clients on one model: whose runs when, and how theirs are joined.

The modules keep what clients sent until it can run, and run it on a model.  They know no rounds.
"""
