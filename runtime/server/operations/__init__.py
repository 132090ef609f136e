"""What a server answers besides training: its health, metrics, sessions, states and files.

Modules here only read, through the public methods of the registry, the sessions and the policy.
Counting belongs in ``metrics.py``, and the decision whether a request is answered at all in
``edge``.
"""
