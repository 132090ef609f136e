"""What breaks over a node is the model's fault if ONNX Runtime refuses it, and else ours."""

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
from splitonnx.partitioner.graphs.builders import MissingOutput, NodeBuilder
from splitonnx.partitioner.inference.node_faults import attribute_errors_to

MISTAKES = [ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, TypeError,
            ValueError, ZeroDivisionError]  # fmt: skip


def make_value(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def make_layer(rows: int = 4) -> ir.Node:
    """Make a Gemm, which takes weights of 4 rows for samples of 4 numbers."""
    inputs = [make_value("x", "N", 4), make_value("w", rows, 3)]
    return ir.node("Gemm", inputs, name="layer", version=18)


def make_unknown() -> ir.Node:
    """Make a node of which ONNX Runtime cannot be asked, since the type of its input is unknown."""
    return ir.node("Gemm", [ir.Value(name="x")], name="layer")


def make_constant(name: str, values: Any) -> ir.Value:
    node = ir.node("Constant", [], {"value": ir.tensor(np.array(values))})
    node.outputs[0].name = name
    return node.outputs[0]


MALFORMED = {
    "weights of another size": make_layer(rows=5),
    "a list of another length": ir.node(
        "MaxPool", [make_value("x", "N", 2, 8, 8)], {"kernel_shape": [2, 2], "pads": [1, 1]}
    ),
    "an input of another rank": ir.node(
        "SpaceToDepth", [make_value("x", "N", 7)], {"blocksize": 2}
    ),
    "a constant of another length": ir.node(
        "Tile", [make_value("x", "N", 2), make_constant("repeats", [1, 2, 3])]
    ),
    "an axis beyond the last": ir.node("Softmax", [make_value("x", "N", 7)], {"axis": 5}),
    "no such mode": ir.node(
        "Resize",
        [make_value("x", "N", 2, 4, 4), None, make_constant("scales", np.ones(4, np.float32))],
        {"mode": "bogus"},
    ),
    "no divisor": ir.node(
        "Conv", [make_value("x", "N", 3, 8, 8), make_value("w", 4, 1, 2, 2)], {"group": 0}
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
@pytest.mark.parametrize("node", MALFORMED.values(), ids=MALFORMED)
def test_an_error_over_a_node_that_onnx_runtime_refuses_is_the_models_fault(
    node: ir.Node, kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UnsupportedModel) as caught, attribute_errors_to(node, "rewritten"):
        raise kind("the divisor")
    assert "not what the operator takes" in str(caught.value)
    assert "the divisor" in str(caught.value)
    assert isinstance(caught.value.__cause__, kind)
    assert not caplog.records


VALID = {
    "a layer": make_layer(),
    "a node with constants": ir.node(
        "Tile", [make_value("x", "N", 2), make_constant("repeats", [1, 2])]
    ),
    "a node without an input": ir.node(
        "Clip", [make_value("x", "N", 2), None, make_constant("most", np.float32(3))]
    ),
    "a division of integers": ir.node(
        "Div",
        [
            ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([2]))
            for name in ("whole", "count")
        ],
    ),
    "a gradient": ir.node(
        "ReluGrad", [make_value("dy", "N", 2), make_value("y", "N", 2)], domain="com.microsoft"
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
@pytest.mark.parametrize("node", VALID.values(), ids=VALID)
def test_an_error_over_a_node_that_onnx_runtime_takes_is_ours(
    node: ir.Node, kind: type[Exception]
) -> None:
    with pytest.raises(InternalModelError) as caught, attribute_errors_to(node, "rewritten"):
        raise kind("no such thing")
    for part in (f"({node.op_type})", "rewritten", kind.__name__, "no such thing"):
        assert part in str(caught.value)
    assert "export" not in str(caught.value)


@pytest.mark.parametrize("kind", MISTAKES)
@pytest.mark.parametrize("node", [*MALFORMED.values(), make_unknown()])
def test_a_node_that_was_handled_before_is_never_at_fault(
    node: ir.Node, kind: type[Exception]
) -> None:
    """ONNX Runtime is not asked: it crashes on some gradients that run alone."""
    raised = pytest.raises(InternalModelError, match="no such thing")
    with raised, attribute_errors_to(node, "lowered", is_valid=True):
        raise kind("no such thing")


def test_a_large_node_is_run_too() -> None:
    node = ir.node("HardSwish", [make_value("x", "N", 4, 600, 600)], name="large")
    raised = pytest.raises(InternalModelError, match=r"node 'large' \(HardSwish\)")
    with raised, attribute_errors_to(node, "rewritten"):
        raise IndexError("list index out of range")


@pytest.mark.parametrize("kind", [AssertionError, IndexError, ValueError, ZeroDivisionError])
def test_where_onnx_runtime_cannot_be_asked_wrong_values_are_the_models_fault(
    kind: type[Exception],
) -> None:
    raised = pytest.raises(UnsupportedModel, match=r"node 'layer' \(Gemm\)")
    with raised, attribute_errors_to(make_unknown(), "rewritten"):
        raise kind("the divisor")


@pytest.mark.parametrize("kind", [AttributeError, KeyError, NameError, RuntimeError, TypeError])
def test_where_onnx_runtime_cannot_be_asked_other_errors_are_ours(kind: type[Exception]) -> None:
    raised = pytest.raises(InternalModelError, match=r"node 'layer' \(Gemm\)")
    with raised, attribute_errors_to(make_unknown(), "rewritten"):
        raise kind("no such thing")


@pytest.mark.parametrize("use", [float, int, range])
def test_an_array_in_place_of_a_number_counts_as_a_wrong_value(
    use: Callable[[Any], object],
) -> None:
    with pytest.raises(UnsupportedModel), attribute_errors_to(make_unknown(), "rewritten"):
        use(np.array([1, 2]))


def test_a_node_whose_body_reads_the_graph_around_it_is_not_run_alone() -> None:
    body = ir.Graph([], [], nodes=[ir.node("Relu", [make_value("outer", 2)])], name="body")
    choice = ir.node("If", [make_value("c")], {"then_branch": body}, name="layer")
    with pytest.raises(UnsupportedModel), attribute_errors_to(choice, "folded"):
        raise IndexError("list index out of range")


def test_a_key_that_is_an_attribute_of_the_node_is_the_models_fault() -> None:
    node = ir.node("GridSample", [ir.Value(name="x")], {"mode": "bogus"}, name="layer")
    with pytest.raises(UnsupportedModel, match="bogus"), attribute_errors_to(node, "rewritten"):
        raise KeyError("bogus")
    with pytest.raises(InternalModelError), attribute_errors_to(node, "rewritten"):
        raise KeyError("linear")


def test_a_key_that_is_a_mode_which_onnx_runtime_takes_is_our_mistake() -> None:
    scales = make_constant("scales", np.ones(4, np.float32))
    node = ir.node("Resize", [make_value("x", "N", 2, 4, 4), None, scales], {"mode": "linear"})
    with pytest.raises(InternalModelError), attribute_errors_to(node, "rewritten"):
        raise KeyError("linear")


@pytest.mark.parametrize("kind", [EncodeError, MemoryError])
def test_what_is_too_large_is_the_models_fault(kind: type[Exception]) -> None:
    with pytest.raises(UnsupportedModel), attribute_errors_to(make_layer(), "rewritten"):
        raise kind("2 GiB")


def test_an_output_that_nothing_makes_is_told_as_the_caller_says() -> None:
    attributing = attribute_errors_to(
        make_layer(), "rewritten", "cannot be differentiated", "cut before it"
    )
    with pytest.raises(UnsupportedModel) as caught, attributing:
        raise MissingOutput("mask")
    assert "its output 'mask' cannot be differentiated" in str(caught.value)
    assert str(caught.value).endswith("cut before it")


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("layer", "node 'layer' (Gemm)"),
        ("layer_Grad/Gemm_3", "the gradient of node 'layer' (Gemm)"),
    ],
)
def test_a_type_that_is_not_known_is_told_of_the_node_not_of_what_is_written(
    name: str, subject: str
) -> None:
    node = make_layer()
    node.name = name
    told = f"{subject}: the element type of its input is not known; export the model with types"
    with pytest.raises(UnsupportedModel) as caught, attribute_errors_to(node, "lowered"):
        NodeBuilder("y/lowered").number(1.0, None)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("error", [UnsupportedModel("it", "is odd"), NotAModel("it", "is odd")])
def test_a_refusal_on_purpose_passes_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, attribute_errors_to(make_layer(), "rewritten"):
        raise error
    assert caught.value is error


def test_an_interruption_is_no_fault_of_the_model() -> None:
    with pytest.raises(KeyboardInterrupt), attribute_errors_to(make_layer(), "rewritten"):
        raise KeyboardInterrupt


def test_a_mistake_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InternalModelError), attribute_errors_to(make_layer(), "rewritten"):
        raise KeyError("no such thing")
    (record,) = caplog.records
    assert (record.name, record.levelno) == (LOGGER, logging.ERROR)
    assert "node 'layer' (Gemm), while it was rewritten" in record.getMessage()
    assert "in test_a_mistake_is_logged_with_its_traceback" in caplog.text
