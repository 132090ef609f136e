"""What of a stage runs beside the rest: which nodes, their graphs, and their threads."""
