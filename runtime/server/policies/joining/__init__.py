"""Rounds: when what clients share is joined, and how.

The modules compute: they neither send, store nor wait, and know no model.
"""
