"""Chaos: real processes, a proxy that cuts between them, ``kill -9``, and bit-equal weights.

``python -m tests.chaos`` (``make chaos``) trains with faults and without, and compares what the two
left on disk.  Everything that is drawn follows from one seed; where the processes stand when a
fault strikes does not, so the same seed repeats the faults and not the race.
"""
