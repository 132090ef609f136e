"""The server: it maps connections to sessions and messages to tasks, and sends the replies.

This package may import every other package of the runtime except the client and the channels.
Limits on connections belong to the edge, their values to ``limits.py``, and running stages to the
engine and the workers.  ``metrics.py`` lists the metrics that Prometheus collects.
"""
