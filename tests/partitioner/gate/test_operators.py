"""Opsets, operators and functions: what is not known, or has no end, is refused."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from splitonnx.errors import ModelError, NotAModel, UnsupportedModel
from splitonnx.partitioner.gate.gates import open_model
from tests.partitioner.gate.broken_models import Breakage, hold_refusal, make_model
from tests.support.zoo import FLOAT, Net


def drop_opset(model: ModelProto) -> None:
    del model.opset_import[:]


def raise_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 99


def custom_operator(model: ModelProto) -> None:
    model.graph.node[1].domain = "com.evil"


def unknown_operator(model: ModelProto) -> None:
    model.graph.node[1].op_type = "Explode"


def training_operator(model: ModelProto) -> None:
    model.graph.node[1].domain = "com.microsoft"


def unknown_attribute(model: ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("speed", 11))


def recursion(model: ModelProto) -> None:
    body = helper.make_node("Again", ["a"], ["b"], domain="mine")
    model.functions.append(
        helper.make_function("mine", "Again", ["a"], ["b"], [body], list(model.opset_import))
    )
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Again", "mine"


BROKEN: list[Breakage] = [
    (drop_opset, NotAModel, "opset"),
    (raise_opset, UnsupportedModel, "opset 99"),
    (custom_operator, UnsupportedModel, "com.evil"),
    (unknown_operator, UnsupportedModel, "Explode"),
    (training_operator, UnsupportedModel, "com.microsoft"),
    (unknown_attribute, NotAModel, "speed"),
    (recursion, UnsupportedModel, "calls itself"),
]


@pytest.mark.parametrize(
    ("break_it", "kind", "reason"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_model_is_refused_in_one_line(
    break_it: Callable[[ModelProto], None], kind: type[ModelError], reason: str
) -> None:
    hold_refusal(break_it, kind, reason)


def test_functions_of_the_model_itself_are_taken() -> None:
    model = make_model()
    body = helper.make_node("Relu", ["a"], ["b"])
    model.functions.append(
        helper.make_function("mine", "Rectify", ["a"], ["b"], [body], list(model.opset_import))
    )
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Rectify", "mine"
    onnx.checker.check_model(model)
    assert FLOAT == TensorProto.FLOAT
    assert len(list(open_model(model).graph)) == len(model.graph.node)


@pytest.mark.parametrize("operator", ["Concat", "Sum"])
def test_a_node_has_a_bounded_number_of_inputs(operator: str) -> None:
    def build(count: int) -> ModelProto:
        net = Net()
        attributes = {"axis": 1} if operator == "Concat" else {}
        net.op(operator, *["x"] * count, out="y", **attributes)
        return net.finish({"x": (FLOAT, ["N", 1])}, "y", count if attributes else 1)

    open_model(build(4096))
    with pytest.raises(UnsupportedModel, match=rf"'y_node' \({operator}\): it has 4097 inputs; at"):
        open_model(build(4097))
