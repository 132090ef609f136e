"""The server: connections become sessions, messages become tasks, replies go back.

The shell on top of every other room but the client's two.  Limits on connections belong to the
edge, their numbers to ``limits.py``, running stages to the engine and the workers.  ``metrics.py``
lists the metrics that Prometheus sees.
"""
