"""Scheduling: turns to compute, memory for tasks, and a limited number of places.

Pure logic; the caller passes a clock.  This package knows owners only by name, and no connections
or stages.  It imports none of the runtime's other packages.
"""
