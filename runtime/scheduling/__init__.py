"""Who comes next: turns to compute, memory for tasks, places of which there are few.

Pure logic with a clock of its caller's.  It knows owners by name alone, no connection and no stage,
and it uses no other room.
"""
