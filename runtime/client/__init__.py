"""The client: data, training loops, checkpoints, histories, explanations, the public ``Client``.

This package runs on the client's device.  Modules here may import the packages ``channels``,
``engine``, ``gate``, ``storage`` and ``wire``, and the module ``limits.py``, which measures the
machine's memory.  They never import the server's packages, so that a device does not load libraries
that only a server needs.
"""
