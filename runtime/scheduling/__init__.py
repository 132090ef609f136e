"""Scheduling: who may compute next, who gets memory for a task, and who gets a worker.

The event loop that a server runs on is made here, too.

Here, an owner is only a name or another key.  Other packages handle connections and stages.
Callers may pass their own clock.  Modules here import none of the runtime's other packages.
"""
