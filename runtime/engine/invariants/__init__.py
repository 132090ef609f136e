"""What a stage computes from the state alone: which nodes, their graph, and when they run again."""
