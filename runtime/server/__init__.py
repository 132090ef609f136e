"""The server: it receives messages from clients, runs their training, and sends the replies.

Modules here may import every other package of the runtime except ``client`` and ``channels``.  Code
that limits connections belongs in ``edge``, the values of all limits in ``limits.py``, and code
that runs stages in ``engine`` or ``workers``.  ``metrics.py`` lists the metrics that Prometheus
collects.
"""
