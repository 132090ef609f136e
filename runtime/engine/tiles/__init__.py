"""Elementwise parts of a stage over tiles that stay in cache: which, their graphs, their runs."""
