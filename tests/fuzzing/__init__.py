"""Fuzzing of the whole cut with mutated models: ``python -m tests.fuzzing SECONDS``."""
