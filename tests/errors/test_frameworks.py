"""Errors about exports and loaded weights name what differs and what to do next."""

from __future__ import annotations

from splitonnx.errors import NotExported, TorchNeeded, WeightsMismatch, WrongExport


def test_a_network_that_cannot_be_exported_is_named_with_each_exporter_s_reason() -> None:
    assert str(NotExported("Net", {"legacy": "no\nway", "dynamo": "never"})) == (
        "Net cannot be exported for training (legacy: no?way; dynamo: never); change what the "
        "reason names, or export it by hand as docs/exporting.md says"
    )


def test_a_wrong_export_says_what_should_be_there() -> None:
    assert str(WrongExport("Net", "its dropout", "1 node", "0", "do this")) == (
        "the export of Net differs in its dropout: it should be 1 node, but is 0; do this"
    )


def test_weights_that_do_not_fit_are_named_but_not_endlessly() -> None:
    many = [f"p{index}" for index in range(10)]
    text = str(WeightsMismatch("bundle", many, ["x"], ["'a' is [2], but [3]"]))
    assert text.startswith("bundle does not fit the network: it has no 'p0', 'p1'")
    assert "'p7' and 2 more; the network has no 'x', which it has trained; 'a' is [2]" in text
    assert text.endswith("strict=False leaves those as they are")
    assert "strict" not in str(WeightsMismatch("bundle", unexpected=["x"]))


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    assert "needs onnxscript, but it is not installed" in str(TorchNeeded("it", "onnxscript", ""))
    assert "2.1 is installed" in str(TorchNeeded("it", "torch", ">=2.5", "2.1"))
