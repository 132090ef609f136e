"""What a user is told about a model before a cut: whether it trains, where it cuts, why not.

It changes nothing.  It may use every other room.
"""
