"""What the other party waits for is computed and sent before the rest of a stage."""
