"""The backward Scan: which way it runs, what it reads, and whose gradients it gives."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from splitonnx.partitioner.differentiation.control_flow.forward import supply_gradients
from splitonnx.partitioner.differentiation.derived.supplied_gradients import SuppliedGradients
from tests.partitioner.differentiation.control_flow.scan_models import LOSS, read, write_scan

STEP = "m = Gemm (a, w, b)  n = Tanh (m)  y = Mul (n, p)"
LAST = "loss = ReduceSumSquare <keepdims = 0> (last)"


def supply(
    trained: list[str], loss: str = LOSS, *, backwards: bool = False
) -> tuple[ir.Model, SuppliedGradients]:
    model = read(write_scan(STEP, loss, backwards=backwards), trained)
    return model, supply_gradients(model, trained, ["loss"])


def find_scan(supplied: SuppliedGradients) -> onnx.NodeProto:
    (scan,) = (node for node in supplied.nodes if node.op_type == "Scan")
    return scan


@pytest.mark.parametrize("backwards", [False, True])
def test_it_runs_the_other_way(backwards: bool) -> None:
    _, supplied = supply(["w"], backwards=backwards)
    directions = {
        attribute.name: set(attribute.ints) for attribute in find_scan(supplied).attribute
    }.get("scan_input_directions", {0})
    assert directions == {int(not backwards)}


def test_each_trained_value_has_a_copy_whose_gradient_is_computed() -> None:
    model, supplied = supply(["w", "p", "s"])
    made = {name for node in supplied.nodes for name in node.output}
    assert {f"{name}_grad" for name in supplied.arguments} <= made
    copies = {v.name: v.producer() for v in model.graph.outputs if v.name in supplied.arguments}
    sources = {node.inputs[0].name for node in copies.values() if node and node.inputs[0]}
    assert sources == {"w", "p", "s"}


def test_it_reads_the_gradients_of_what_the_loss_reads() -> None:
    for loss, names in ((LOSS, {"last", "rows"}), (LAST, {"last"})):
        _, supplied = supply(["w"], loss)
        assert set(supplied.results) == names
        read_names = set(find_scan(supplied).input)
        assert {f"{name}_grad" for name in names} <= read_names


def test_a_last_state_that_is_not_used_has_a_gradient_of_zero() -> None:
    _, supplied = supply(["w"], "loss = ReduceSumSquare <keepdims = 0> (rows)")
    first = find_scan(supplied).input[0]
    (source,) = (node for node in supplied.nodes if first in node.output)
    assert source.op_type == "Expand"


def test_the_gradient_of_weights_is_one_product_of_all_steps() -> None:
    _, supplied = supply(["w"])
    assert [node.op_type for node in supplied.nodes].count("Gemm") == 1
    (body,) = (a.g for a in find_scan(supplied).attribute if a.name == "body")
    assert [node.op_type for node in body.node].count("Gemm") == 1
