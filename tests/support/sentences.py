"""What every error of splitonnx promises: facts as attributes, and one printable line."""

from __future__ import annotations

from splitonnx.errors import SplitonnxError


def check_sentence(error: SplitonnxError, *facts: object) -> None:
    """Check that an error's sentence is one line that holds the facts, and no word of Python."""
    sentence = str(error)
    assert sentence
    assert "\n" not in sentence
    assert not sentence.endswith(".")
    for word in ("None", "<class", "object at"):
        assert word not in sentence
    for fact in facts:
        assert str(fact) in sentence, (sentence, fact)
