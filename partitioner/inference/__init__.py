"""Infer whatever does not depend on a model's data: shapes, types and constants.

Rules compute shapes, constants are folded, and branches and loops whose conditions and lengths are
known are replaced by the nodes that they would run.  Modules here may import ``graphs`` and
``native``.
"""
