"""What is known of a model before any data come: shapes, types, constants, control flow.

One machine: rules that give shapes, values that are folded, branches and loops that are known in
advance.  It may use graphs and the native room.
"""
