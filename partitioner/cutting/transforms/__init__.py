"""What is put on a crossing: codecs, as nodes of the sender's and the receiver's graphs.

What a codec computes belongs here, and how it gets into a finished bundle.  What crosses, and the
stages themselves, do not: they are the same with and without codecs.  May use the rooms that
cutting may use.
"""
