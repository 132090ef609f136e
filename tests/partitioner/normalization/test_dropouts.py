"""Dropout's mask is a function of seed, step, micro-batch and node, and of nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.manifests import KEY
from splitonnx.partitioner.normalization.dropouts import remove_dropouts, seed_dropouts
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.partitioner.reports.u_shapes.pairs import inspect_pairs
from tests.support.keyed import draw_words
from tests.support.zoo import FLOAT, ZOO, Net


def make_session(ratio: float = 0.3, name: str = "drop") -> onnxruntime.InferenceSession:
    net = Net()
    net.dropout("x", ratio, out=name)
    net.op("Identity", name, out="y")
    model = ir.from_proto(net.finish({"x": (FLOAT, ["N", 50])}, "y", 50))
    seed_dropouts(model.graph, mode=None)
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())


def draw(session: onnxruntime.InferenceSession, *key: int, rows: int = 40) -> np.ndarray:
    ones = np.ones((rows, 50), np.float32)
    result: np.ndarray = session.run(None, {"x": ones, KEY: np.array(key, np.int64)})[0]
    return result


def reference(key: tuple[int, int, int], node: str, size: int, ratio: float) -> np.ndarray:
    kept: np.ndarray = draw_words(key, node, size) < round((1 - ratio) * 2**32)
    return kept


@pytest.mark.parametrize("key", [(0, 0, 0), (1, 2, 3), (-5, 10**9, 0), (2**40, 7, 1)])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_the_mask_is_the_documented_function(key: tuple[int, int, int], ratio: float) -> None:
    found = draw(make_session(ratio), *key)
    kept = reference(key, "drop_node", found.size, ratio).reshape(found.shape)
    np.testing.assert_array_equal(found != 0, kept)
    np.testing.assert_allclose(found[kept], 1 / (1 - ratio), rtol=1e-6)


def test_the_same_key_gives_the_same_mask_in_another_session() -> None:
    np.testing.assert_array_equal(draw(make_session(), 1, 2, 3), draw(make_session(), 1, 2, 3))


def test_masks_of_different_keys_and_nodes_are_independent() -> None:
    session = make_session(0.5)
    masks = [draw(session, *key) != 0 for key in np.ndindex(2, 3, 2)]
    masks.append(draw(make_session(0.5, "other"), 0, 0, 0) != 0)
    for index, one in enumerate(masks):
        for another in masks[:index]:
            assert abs(np.corrcoef(one.ravel(), another.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_the_ratio_says(ratio: float) -> None:
    session = make_session(ratio)
    rates = [(draw(session, 0, step, 0, rows=400) == 0).mean() for step in range(10)]
    assert abs(np.mean(rates) - ratio) < 0.005
    neighbours = draw(session, 0, 0, 0, rows=400).ravel() == 0
    assert abs(np.corrcoef(neighbours[1:], neighbours[:-1])[0, 1]) < 0.03


def test_a_changed_seed_changes_training_and_none_changes_predictions() -> None:
    graph = cut(ZOO["dropout"].build(), at="d1").client.graphs
    assert KEY.encode() in graph["head.forward.onnx"]
    assert KEY.encode() not in graph["head.predict.onnx"]


def test_dropout_can_be_turned_off_and_on() -> None:
    model = ZOO["dropout"].build()
    off = cut(model, at="d1", dropout="off")
    assert KEY.encode() not in off.client.graphs["head.forward.onnx"]
    for node in model.graph.node:
        if node.op_type == "Dropout":
            del node.input[2:]  # as exported for inference
    assert KEY.encode() not in cut(model, at="d1").client.graphs["head.forward.onnx"]
    kept = cut(model, at="d1", dropout="keep")
    assert KEY.encode() in kept.client.graphs["head.forward.onnx"]


def test_a_ratio_that_is_computed_is_refused() -> None:
    net = Net()
    rate = net.op("ReduceMean", "x", out="rate", keepdims=0)
    net.op("Dropout", "x", rate, net.constant("on", np.array(True)), out="dropped")
    net.op("Identity", "dropped", out="y")
    model = ir.from_proto(net.finish({"x": (FLOAT, ["N", 5])}, "y", 5))
    with pytest.raises(UnsupportedModel, match="dropped_node"):
        seed_dropouts(model.graph, mode=None)
    remove_dropouts(model.graph)
    assert [node.op_type for node in model.graph] == ["ReduceMean", "Identity", "Identity"]


def test_keeping_what_is_not_there_is_refused_and_leaving_it_off_is_not() -> None:
    model = ZOO["chain"].build()
    with pytest.raises(UsageError, match="--dropout keep has no effect: the model has no Dropout"):
        cut(model, at=None, dropout="keep")
    cut(model, at=None, dropout="off")
    net = Net()
    net.op("Dropout", net.op("MatMul", "x", net.weight("w", 6, 3), out="h"),
           net.constant("ratio", np.array(0, np.float32)), out="y")  # fmt: skip
    with pytest.raises(UsageError, match="the ratio of 'y_node' is 0"):
        cut(net.finish({"x": (FLOAT, ["N", 6])}, "y", 3), at=None, loss="mse", dropout="keep")


def build_open(kind: str) -> onnx.ModelProto:
    """Build a Dropout whose ratio or mode is an input of the model."""
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w", 6, 5), out="hidden")
    ratio = "rate" if kind == "ratio" else net.constant("half", np.array(0.5, np.float32))
    mode = "mode" if kind == "mode" else net.constant("on", np.array(True))
    value = net.op("Dropout", hidden, ratio, mode, out="dropped")
    net.op("MatMul", value, net.weight("v", 5, 3), out="y")
    name, dtype = ("rate", FLOAT) if kind == "ratio" else ("mode", onnx.TensorProto.BOOL)
    return net.finish({"x": (FLOAT, ["N", 6]), name: (dtype, [])}, "y", 3)


def test_a_mode_that_is_an_input_is_chosen_with_the_option_that_is_named() -> None:
    model = build_open("mode")
    for call in (check, inspect, inspect_pairs):
        with pytest.raises(UnsupportedModel, match=r"choose with --dropout keep\|off"):
            call(model)
        assert call(model, dropout="off")
        assert call(model, dropout="keep")


def test_a_ratio_that_is_an_input_is_given_with_the_option_that_is_named() -> None:
    model = build_open("ratio")
    with pytest.raises(UnsupportedModel, match="give its value with --bind rate=RATIO"):
        check(model)
    assert check(model, bind={"rate": 0.3}).trainable
