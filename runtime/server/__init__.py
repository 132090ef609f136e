"""The server, which receives messages from clients, trains its part of the model, and replies.

Modules here may import every other package of the runtime except ``client`` and ``channels``.  Code
that limits connections belongs in ``edge``, the values of all limits in ``limits.py``, and code
that runs stages in ``engine`` or ``workers``.  ``metrics.py`` lists the metrics that Prometheus
collects, and ``operations`` answers requests that are not part of training.
"""
