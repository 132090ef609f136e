"""Faults in a model become one sentence that names the node, or the pass, and the first cause."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from google.protobuf.message import EncodeError

from splitonnx.errors import InternalModelError, NotAModel, UnsupportedModel
from splitonnx.faults import LOGGER
from splitonnx.partitioner.graphs.builders import MissingOutput
from splitonnx.partitioner.graphs.faults import (
    FAULTS,
    attribute_errors_to,
    attribute_errors_to_bytes,
    attribute_errors_to_pass,
    explain,
)


def make_node() -> ir.Node:
    return ir.node("Gemm", [ir.Value(name="x")], name="layer")


@pytest.mark.parametrize("kind", [*FAULTS, KeyError, IndexError, ZeroDivisionError])
def test_values_that_an_operator_does_not_take_are_the_models_fault(kind: type[Exception]) -> None:
    raised = pytest.raises(UnsupportedModel, match=r"node 'layer' \(Gemm\)")
    with raised as caught, attribute_errors_to(make_node(), "rewritten"):
        raise kind("the divisor")
    assert "the divisor" in str(caught.value)
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize("use", [float, int, range])
def test_an_array_in_place_of_a_number_is_the_models_fault(use: Callable[[Any], object]) -> None:
    raised = pytest.raises(UnsupportedModel, match=r"node 'layer' \(Gemm\)")
    with raised, attribute_errors_to(make_node(), "rewritten"):
        use(np.array([1, 2]))


@pytest.mark.parametrize("kind", [AssertionError, AttributeError, NameError, TypeError])
def test_any_other_error_is_ours_and_names_the_work_and_the_node(kind: type[Exception]) -> None:
    with pytest.raises(InternalModelError) as caught, attribute_errors_to(make_node(), "rewritten"):
        raise kind("no such thing")
    for part in ("node 'layer' (Gemm)", "rewritten", kind.__name__, "no such thing"):
        assert part in str(caught.value)
    assert "export" not in str(caught.value)


@pytest.mark.parametrize("kind", [AttributeError, KeyError, TypeError, ValueError])
def test_an_error_of_a_pass_is_ours_and_names_the_pass(kind: type[Exception]) -> None:
    with pytest.raises(InternalModelError) as caught, attribute_errors_to_pass("written down"):
        raise kind("a wrong rank")
    assert "written down" in str(caught.value)
    assert "a wrong rank" in str(caught.value)


@pytest.mark.parametrize("kind", [EncodeError, MemoryError])
def test_a_model_that_is_too_large_for_a_pass_is_told_so(kind: type[Exception]) -> None:
    with pytest.raises(UnsupportedModel, match="too large"), attribute_errors_to_pass("written"):
        raise kind("2 GiB")


def test_an_output_that_nothing_makes_is_told_as_the_caller_says() -> None:
    attributing = attribute_errors_to(
        make_node(), "rewritten", "cannot be differentiated", "cut before it"
    )
    with pytest.raises(UnsupportedModel) as caught, attributing:
        raise MissingOutput("mask")
    assert "its output 'mask' cannot be differentiated" in str(caught.value)
    assert str(caught.value).endswith("cut before it")


@pytest.mark.parametrize("error", [UnsupportedModel("it", "is odd"), NotAModel("it", "is odd")])
def test_a_refusal_on_purpose_passes_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, attribute_errors_to(make_node(), "rewritten"):
        raise error
    assert caught.value is error
    with pytest.raises(type(error)) as caught, attribute_errors_to_pass("read"):
        raise error
    assert caught.value is error


def test_an_interruption_is_no_fault_of_the_model() -> None:
    with pytest.raises(KeyboardInterrupt), attribute_errors_to(make_node(), "rewritten"):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), attribute_errors_to_pass("read"):
        raise KeyboardInterrupt


def test_work_that_succeeds_is_left_alone() -> None:
    with attribute_errors_to(make_node(), "rewritten"), attribute_errors_to_pass("read"):
        done = True
    assert done


def refuse(reason: str) -> NotAModel:
    return NotAModel("the model", reason)


@pytest.mark.parametrize("kind", [*FAULTS, AssertionError, AttributeError, RuntimeError, TypeError])
def test_any_error_that_is_raised_over_bytes_elsewhere_refuses_them(kind: type[Exception]) -> None:
    with pytest.raises(NotAModel, match="odd bytes") as caught, attribute_errors_to_bytes(refuse):
        raise kind("odd bytes")
    assert isinstance(caught.value.__cause__, kind)


def test_an_error_of_our_own_reader_of_bytes_is_not_their_fault() -> None:
    wrong: Any = explain
    with pytest.raises(NotAModel), attribute_errors_to_bytes(refuse):
        wrong(None, None)  # the call fails, here in a test
    with pytest.raises(AttributeError), attribute_errors_to_bytes(refuse):
        wrong(None)


def test_the_node_that_a_pass_was_at_is_named() -> None:
    def go_through() -> None:
        for node in (make_node(), ir.node("Relu", [], name="next")):
            if node.op_type == "Relu":
                raise TypeError("no such thing")

    with pytest.raises(InternalModelError) as caught, attribute_errors_to_pass("sorted"):
        go_through()
    assert caught.value.subject == "the model at node 'next' (Relu)"


def test_a_mistake_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InternalModelError), attribute_errors_to(make_node(), "rewritten"):
        raise AttributeError("no such thing")
    (record,) = caplog.records
    assert (record.name, record.levelno) == (LOGGER, logging.ERROR)
    assert "node 'layer' (Gemm), while it was rewritten" in record.getMessage()
    assert "in test_a_mistake_is_logged_with_its_traceback" in caplog.text


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_the_model_is_not_logged(
    kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UnsupportedModel), attribute_errors_to(make_node(), "rewritten"):
        raise kind("the divisor")
    assert not caplog.records


def test_the_first_cause_is_explained() -> None:
    first = ValueError("a dimension is negative")
    second, last = RuntimeError("the node failed"), RuntimeError("the model failed")
    second.__cause__, last.__cause__ = first, second
    assert explain(last) == "a dimension is negative"


def test_an_explanation_is_one_short_line_of_printable_text() -> None:
    told = explain(ValueError("first\n  second\tthird\x1b[31m" + "x" * 1000))
    assert told.startswith("first second third?[31mxxx")
    assert told.isprintable()
    assert len(told) <= 160
    assert explain(AssertionError()) == "a type or shape that is not known"
