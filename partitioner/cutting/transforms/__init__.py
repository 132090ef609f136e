"""Change a finished bundle: put codecs on what crosses the cut, or compute stages again.

What a codec computes belongs here, and how it gets into a bundle.  What crosses, and the stages
themselves, do not: they are the same with and without codecs.  May use the rooms that cutting may
use.
"""
