"""Divide a model between parties: find legal cuts and wires, and build each party's stages.

This package may import every other package except the reports.
"""
