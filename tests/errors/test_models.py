"""Errors of the user's model, and of the place where it is to be cut."""

from __future__ import annotations

import pytest

from splitonnx.errors import (
    BatchNotFreed,
    CutError,
    ForbiddenExternalData,
    InputsNotPermitted,
    IntegerCut,
    InternalModelError,
    LabelsNotPermitted,
    MixedSamples,
    ModelError,
    NativeCrash,
    NotACut,
    NotAModel,
    NotDifferentiable,
    SharedParameter,
    SplitonnxError,
    TooManyTries,
    UnknownTensor,
    UnsupportedModel,
)
from tests.support.sentences import check_sentence


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (NotAModel("a.onnx", "it is text"), ("a.onnx", "it is text")),
        (UnsupportedModel("node 'n'", "too deep", "fold it"), ("node 'n'", "too deep", "fold it")),
        (ForbiddenExternalData("w", "../secret"), ("'w'", "../secret")),
        (NotDifferentiable("n", "Det", "freeze it"), ("'n'", "Det", "freeze it")),
        (UnknownTensor("h1", ("h", "h2")), ("'h1'", "did you mean 'h', 'h2'?")),
        (NotACut(("a",), ("b", "c")), ("'a'", "'b', 'c'", "splitonnx inspect")),
        (NotACut(("a",), tuple(f"t{n}" for n in range(300))), ("'t0', 't1'", "'t6' and 293 more")),
        (NotACut(("a",), ("mask",), raw=("mask",)), ("'a'", "'mask'", "--send-input mask")),
        (InputsNotPermitted(("a",), ("x", "y z")), ("'a'", "--send-input x --send-input 'y z' (")),
        (
            InputsNotPermitted(("a",), ("x",)),
            ("'a', computed on a path", "behind the next layer"),
        ),
        (
            InputsNotPermitted(("a", "b@client_grad"), ("x",)),
            (
                "'a', the gradient of 'b', comp",
                "behind the next layer",
                "and end the server's part",
            ),
        ),
        (InputsNotPermitted(("x",), ("x",)), ("send the raw input 'x'; to", "behind the first")),
        (InputsNotPermitted(("x",), ("x",), labels=True), ("'x'", "input x --send-labels (")),
        (LabelsNotPermitted(), ("--send-labels", "send_labels=True", "--tail-at")),
        (NotACut(tuple("abcdefgh"), reason="it is odd"), ("'a', 'b', 'c' and 5 more", "odd")),
        (
            LabelsNotPermitted(gradients=["y"]),
            ("layer of weights between", "'y'", "--send-labels", "--tail-at", "before the last"),
        ),
        (NotACut(("a",), reason="it is an input"), ("'a'", "it is an input")),
        (IntegerCut("t", "I64", ("w",)), ("'t'", "I64", "'w'")),
        (
            MixedSamples("m.onnx", "--dim x:0=N", 1, "pool", "ReduceMean", "p", "y"),
            ("'pool'", "ReduceMean", "m.onnx", "'p'", "'y'", "dynamic batch", "--batch-size 1"),
        ),
        (
            BatchNotFreed("m.onnx", "--dim x:0=N", 8, 16, "Squeeze\nfails"),
            ("--dim x:0=N", "16 samples", "--batch-size 8", "Squeeze fails"),
        ),
        (SharedParameter(("w", "v")), ("'w', 'v'", "--freeze")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_sentence_holds_the_facts_and_the_next_thing_to_try(
    error: SplitonnxError, facts: tuple[object, ...]
) -> None:
    check_sentence(error, *facts)


@pytest.mark.parametrize(
    "error", [UnsupportedModel("x", "y"), NotDifferentiable("n", "Det"), UnknownTensor("h")]
)
def test_without_advice_the_sentence_ends_with_the_reason(error: SplitonnxError) -> None:
    check_sentence(error)
    assert not str(error).rstrip().endswith((";", ",", ":"))
    assert "did you mean" not in str(error)


@pytest.mark.parametrize("kind", [NativeCrash, TooManyTries])
def test_what_no_node_is_known_to_be_at_fault_for_is_an_unsupported_model_too(
    kind: type[UnsupportedModel],
) -> None:
    error = kind("the model", "it took too long")
    assert isinstance(error, UnsupportedModel)
    check_sentence(error, "the model", "it took too long")


def test_a_mistake_of_ours_is_no_fault_of_the_model_and_asks_for_a_report() -> None:
    error = InternalModelError("node 'a' (Elu)", "rewritten", "TypeError: no such thing")
    assert not isinstance(error, ModelError)
    check_sentence(error, "a mistake in splitonnx, not in the model", "node 'a' (Elu)")
    check_sentence(error, "while it was rewritten", "TypeError: no such thing", "report")


def test_a_model_and_the_place_of_its_cut_are_told_apart() -> None:
    assert issubclass(NotDifferentiable, ModelError)
    assert not issubclass(NotDifferentiable, CutError)
    assert issubclass(NotACut, CutError)
    assert not issubclass(NotACut, ModelError)
