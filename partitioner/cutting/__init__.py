"""From a model to parties: where it can be cut, what crosses, and each party's stages.

It may use every room but the reports.
"""
