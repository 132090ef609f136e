"""What exporters change is mended: modes, dropout in attention, running statistics."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.partitioner.gate.exporters import CHECKED
from splitonnx.torch.repairs import (
    is_on,
    mark_checked,
    restore_buffers,
    train_batchnorms,
    turn_on_dropouts,
)

ROWS = np.array([[1.0, -2.0], [3.0, 6.0]], np.float32)


def build(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    weights = {"s": np.ones(2), "b": np.zeros(2), "n.running_mean": np.zeros(2), "v": np.ones(2)}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def build_norm() -> onnx.ModelProto:
    names = ["x", "s", "b", "n.running_mean", "v"]
    return build(helper.make_node("BatchNormalization", names, ["y"], epsilon=0.0, momentum=0.9))


def test_a_batchnorm_that_trains_normalises_by_the_batch() -> None:
    model = build_norm()
    train_batchnorms(model, {"n.running_mean"})
    onnx.checker.check_model(model, full_check=True)
    (found,) = ReferenceEvaluator(model).run(None, {"x": ROWS})
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, (ROWS - ROWS.mean(0)) / ROWS.std(0), rtol=1e-6)
    again = onnx.ModelProto()
    again.CopyFrom(model)
    train_batchnorms(again, {"n.running_mean"})
    assert again == model


def test_a_batchnorm_that_the_user_froze_stays_frozen() -> None:
    model = build_norm()
    train_batchnorms(model, {"other.running_mean"})
    assert model == build_norm()


def test_a_dropout_that_says_nothing_is_turned_on() -> None:
    model = build(helper.make_node("Dropout", ["x"], ["y"]))
    turn_on_dropouts(model)
    onnx.checker.check_model(model, full_check=True)
    (node,) = model.graph.node
    assert is_on(node)
    assert numpy_helper.to_array(model.graph.initializer[-1]) == np.array(True)


def test_statistics_that_the_export_updated_are_those_of_the_network_again() -> None:
    model = build_norm()
    restore_buffers(model, {"n.running_mean": np.array([5.0, 6.0]), "v": np.ones(3)})
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    np.testing.assert_array_equal(found["n.running_mean"], np.array([5, 6], np.float32))
    np.testing.assert_array_equal(found["v"], np.ones(2, np.float32))


def test_a_compared_model_is_marked() -> None:
    model = build_norm()
    mark_checked(model)
    assert [entry.key for entry in model.metadata_props] == [CHECKED]
