"""The order of the passes that prepare a model for cutting, and the conditions of each pass.

Most passes are implemented in the packages ``normalization``, ``inference`` and ``rewrites``.  They
do not depend on where the model is cut.
"""
