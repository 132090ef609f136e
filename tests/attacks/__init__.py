"""The attacks of an independent review of 0.1.0, against real processes; ``make attack`` runs them.

Each attack speaks to the server by a socket and its own few lines of the wire format, or calls the
command line, so that it runs against any checkout: against that of 0.1.0 they succeed.
"""
