"""Scheduling: who may compute next, who gets memory for a task, and who gets a worker.

These modules know owners only by name, and know nothing about connections or stages.  Callers may
pass their own clock.  Modules here import none of the runtime's other packages.
"""
