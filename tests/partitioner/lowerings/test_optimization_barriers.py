"""A barrier computes nothing, and ONNX Runtime's optimizer merges nothing across it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.lowerings.optimization_barriers import (
    find_producer,
    insert_barrier,
    list_readers,
)
from tests.support.nets import FLOAT, Net
from tests.support.small_models import evaluate

X = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)


def build() -> ir.Model:
    net = Net()
    net.op("Identity", net.op("Tanh", "x", out="t"), out="same")
    net.op("Sub", "same", net.constant("one", np.ones(3, np.float32)), out="y")
    return ir.from_proto(net.finish({"x": (FLOAT, ["N", 3])}, "y", 3))


def test_a_barrier_changes_no_result_and_two_have_names_of_their_own() -> None:
    model = build()
    last = model.graph[-1]
    insert_barrier(last, 0)
    model.graph[-2].op_type = "Identity"  # as the rewrite for training does
    insert_barrier(last, 0)
    assert [node.op_type for node in model.graph] == ["Tanh", "Identity", "Identity", "Sum", "Sub"]
    names = [output.name for node in model.graph for output in node.outputs]
    assert len(set(names)) == len(names)
    found = evaluate(ir.to_proto(model), {"x": X})["y"]
    np.testing.assert_allclose(found, np.tanh(X) - 1, rtol=1e-6)


def test_producers_and_readers_are_found_through_identities() -> None:
    tanh, _, last = build().graph
    assert find_producer(last.inputs[0], "Tanh") is tanh
    assert find_producer(last.inputs[0], "Relu") is None
    assert list(list_readers(tanh.outputs[0])) == [(last, 0)]
