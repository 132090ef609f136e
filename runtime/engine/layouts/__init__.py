"""Blocked layouts of images: which nodes of a stage graph run on them, and the graphs' bytes."""
