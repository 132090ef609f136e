"""Policies: how the training steps of many clients change the server's models.

A session gives a policy the tasks of one client.  The policy decides when a task runs, and on which
model.  Both exchange data only, so they may run in different processes.
"""
