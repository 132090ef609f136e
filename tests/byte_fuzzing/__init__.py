"""Coverage-guided fuzzing of all that reads bytes: ``python -m tests.byte_fuzzing``, with atheris.

``targets`` says what must hold of any bytes, ``framings`` gets past the lengths at the front of
them, ``corpora`` writes the inputs to start from, ``harnesses`` is what atheris runs.
"""
