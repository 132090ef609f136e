"""Hostile and broken models: each with a piece of the sentence that refuses it.

Most are the zoo's chain, spoiled.  What spoils it stands beside others of its kind.
"""

from tests.support.hostile import files, names, operators, sizes, types
from tests.support.hostile.entries import HOSTILE, complete

__all__ = ["HOSTILE", "complete", "files", "names", "operators", "sizes", "types"]
