"""Scheduling: who may compute next, who gets memory for a task, and who gets a worker.

Here, an owner is only a name or another key.  Other packages handle connections and stages.
Callers may pass their own clock.  Modules here import none of the runtime's other packages.
"""
