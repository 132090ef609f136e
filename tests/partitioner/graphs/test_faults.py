"""Faults in a model become one sentence that names the node, or the pass, and the first cause."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from google.protobuf.message import EncodeError

from splitonnx.errors import InternalModelError, NotAModel, UnsupportedModel
from splitonnx.faults import LOGGER
from splitonnx.partitioner.graphs.faults import (
    FAULTS,
    attribute_errors_to_bytes,
    attribute_errors_to_pass,
    explain,
    is_ours,
)


def make_node() -> ir.Node:
    return ir.node("Gemm", [ir.Value(name="x")], name="layer")


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


@pytest.mark.parametrize("error", [UnsupportedModel("it", "is odd"), NotAModel("it", "is odd")])
def test_a_refusal_on_purpose_passes_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, attribute_errors_to_pass("read"):
        raise error
    assert caught.value is error


def test_an_interruption_is_no_fault_of_the_model() -> None:
    with pytest.raises(KeyboardInterrupt), attribute_errors_to_pass("read"):
        raise KeyboardInterrupt


def test_work_that_succeeds_is_left_alone() -> None:
    with attribute_errors_to_pass("read"), attribute_errors_to_bytes(refuse):
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


CODE = {
    "our own": ("splitonnx.partitioner.x", "{}['missing']", True),
    "numpy, called by ours": ("splitonnx.partitioner.x", "np.split(np.zeros(3), 2)", True),
    "a library": ("onnx_ir.x", "{}['missing']", False),
    "numpy, called by a library": ("onnx.reference.x", "np.split(np.zeros(3), 2)", False),
    "text that is not UTF-8": ("splitonnx.partitioner.x", "b'\\xff'.decode()", False),
    "protobuf": ("splitonnx.partitioner.x", "ModelProto.FromString(b'odd')", False),
}


@pytest.mark.parametrize(("module", "code", "expected"), CODE.values(), ids=CODE)
def test_whose_code_raised_an_error_is_read_from_its_traceback(
    module: str, code: str, expected: bool
) -> None:
    names = {"__name__": module, "np": np, "ModelProto": onnx.ModelProto}
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of several kinds
        exec(code, names)
    assert is_ours(caught.value) is expected


def test_a_lack_of_memory_is_not_our_mistake() -> None:
    with pytest.raises(MemoryError) as caught:
        exec("raise MemoryError", {"__name__": "splitonnx.partitioner.x"})
    assert not is_ours(caught.value)


def test_the_node_that_a_pass_was_at_is_named() -> None:
    def go_through() -> None:
        for node in (make_node(), ir.node("Relu", [], name="next")):
            if node.op_type == "Relu":
                raise TypeError("no such thing")

    with pytest.raises(InternalModelError) as caught, attribute_errors_to_pass("sorted"):
        go_through()
    assert caught.value.subject == "the model at node 'next' (Relu)"


def test_a_mistake_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InternalModelError), attribute_errors_to_pass("sorted"):
        raise AttributeError("no such thing")
    (record,) = caplog.records
    assert (record.name, record.levelno) == (LOGGER, logging.ERROR)
    assert "the model, while it was sorted" in record.getMessage()
    assert "in test_a_mistake_is_logged_with_its_traceback" in caplog.text


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
