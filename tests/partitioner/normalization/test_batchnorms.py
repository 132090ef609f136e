"""BatchNormalization: its modes, its running statistics, and a frozen one as its formula."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.names import BatchNormModes
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.normalization.batchnorms import (
    NEXT,
    freeze_batchnorms,
    is_training,
    list_batchnorms,
    trace_statistic,
    train_batchnorms,
    use_running_statistics,
)
from tests.support.zoo import FLOAT, Net


def build(*trained: bool, rank: int = 4) -> ir.Model:
    """One BatchNormalization behind the other, each in training mode or not."""
    net, value = Net(), "x"
    for index, training in enumerate(trained):
        value = net.batchnorm(value, 3, out=f"n{index}", training=training)
    dims: list[int | str] = ["N", 3, *[5] * (rank - 2)]
    model = net.finish({"x": (FLOAT, dims)}, value, *dims[1:])
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def evaluate(model: ir.Model, x: np.ndarray) -> np.ndarray:
    found, *_ = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    return np.asarray(found)


def draw(rank: int) -> np.ndarray:
    shape = (4, 3, *[5] * (rank - 2))
    return np.random.default_rng(0).normal(1, 2, shape).astype(np.float32)


def test_nodes_are_listed_in_order_with_their_modes() -> None:
    nodes = list_batchnorms(build(True, False).graph)
    assert [node.name for node in nodes] == ["n0.bn", "n1.bn"]
    assert [is_training(node) for node in nodes] == [True, False]
    nodes[0].domain = "my.domain"
    assert len(list_batchnorms(nodes[1].graph)) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (None, [True, False]),
        ("train", [True] * 2),
        ("frozen", [False] * 2),
        ({"^n1": "train"}, [True] * 2),
        ({"n0.bn.mean": "frozen"}, [False] * 2),
        ({".": "frozen", "^n1": "train"}, [False, True]),
        ({"^n1": "train", ".": "frozen"}, [False] * 2),
    ],
)
def test_a_mode_overrules_what_each_node_says(mode: BatchNormModes, expected: list[bool]) -> None:
    model = build(True, False)
    successors = train_batchnorms(model.graph, mode=mode)
    assert [is_training(node) for node in list_batchnorms(model.graph)] == expected
    names = [f"n{i}.bn.{s}" for i, on in enumerate(expected) if on for s in ("mean", "var")]
    assert list(successors) == names


def test_a_pattern_that_finds_no_node_is_refused_with_their_names() -> None:
    told = r"matches no BatchNormalization; .*'n0\.bn', 'n1\.bn'"
    with pytest.raises(UnsupportedModel, match=told):
        train_batchnorms(build(True, False).graph, mode={"^n2": "train"})


def test_a_pattern_that_is_no_expression_is_refused() -> None:
    with pytest.raises(UsageError, match="is not a regular expression"):
        train_batchnorms(build(True, False).graph, mode={"(": "train"})


def test_every_running_statistic_has_a_successor_in_the_graph() -> None:
    model = build(False)
    successors = train_batchnorms(model.graph, mode="train")
    assert successors == {f"n0.bn.{s}": f"n0.bn.{s}{NEXT}" for s in ("mean", "var")}
    values = map_values(model.graph)
    for statistic, successor in successors.items():
        assert values[successor].shape == values[statistic].shape
        assert values[successor].dtype == values[statistic].dtype
    named = build(True)
    assert train_batchnorms(named.graph, mode=None) == {
        f"n0.bn.{s}": f"n0.bn.{s}_next" for s in ("mean", "var")
    }


def test_a_statistic_of_two_nodes_is_handed_from_one_to_the_next() -> None:
    model = build(True, True)
    first, second = list_batchnorms(model.graph)
    mean = first.inputs[3]
    second.replace_input_with(3, mean)
    successors = train_batchnorms(model.graph, mode=None)
    assert successors["n0.bn.mean"] == second.outputs[1].name
    assert second.inputs[3] is first.outputs[1]
    copy = first.inputs[3]
    assert copy is not None
    (use,) = mean.uses()  # type: ignore[union-attr]
    assert use.node.op_type == "Max"
    assert use.node is copy.producer()
    assert trace_statistic(second.outputs[1], {first, second}) is second.outputs[1]
    assert trace_statistic(second.outputs[1], {first}) is first.outputs[1]
    assert trace_statistic(second.outputs[1], set()) is None


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_a_frozen_node_becomes_its_formula(rank: int) -> None:
    x = draw(rank)
    expected = evaluate(build(False, rank=rank), x)
    model = build(False, rank=rank)
    assert freeze_batchnorms(model.graph) == {"n0.bn.mean", "n0.bn.var"}
    assert list_batchnorms(model.graph) == []
    assert [value.name for value in model.graph.outputs] == ["n0"]
    np.testing.assert_allclose(evaluate(model, x), expected, rtol=1e-5, atol=1e-5)


def test_epsilon_is_that_of_the_node() -> None:
    model = build(False)
    (node,) = list_batchnorms(model.graph)
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.75)
    expected = evaluate(model, draw(4))
    freeze_batchnorms(model.graph)
    np.testing.assert_allclose(evaluate(model, draw(4)), expected, rtol=1e-5, atol=1e-5)


def test_a_node_that_trains_is_not_frozen() -> None:
    model = build(True, False)
    assert freeze_batchnorms(model.graph) == {"n1.bn.mean", "n1.bn.var"}
    assert [node.name for node in list_batchnorms(model.graph)] == ["n0.bn"]


def test_a_rank_that_is_not_known_is_refused_by_name() -> None:
    model = build(False)
    model.graph.inputs[0].shape = None
    with pytest.raises(UnsupportedModel, match=r"'n0\.bn' \(BatchNormalization\): the rank"):
        freeze_batchnorms(model.graph)


def test_prediction_uses_the_running_statistics() -> None:
    model = build(True)
    mean = helper.make_tensor_value_info("n0.bn.mean_next", FLOAT, [3])
    proto = ir.to_proto(model)
    proto.graph.output.append(mean)
    model = ir.from_proto(proto)
    use_running_statistics(model.graph)
    (node,) = list_batchnorms(model.graph)
    assert not is_training(node)
    assert len(node.outputs) == 1
    x = draw(4)
    found, mean_next = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_allclose(np.asarray(found), evaluate(build(False), x), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(mean_next), np.full(3, 0.1, np.float32))


def test_training_what_is_not_there_is_refused_and_freezing_it_is_not() -> None:
    graph = ir.from_proto(build_bare().finish({"x": (FLOAT, ["N", 6])}, "y", 6)).graph
    with pytest.raises(UsageError, match="--batchnorm train has no effect: the model has no Batch"):
        train_batchnorms(graph, mode="train")
    assert train_batchnorms(graph, mode="frozen") == {}


def build_bare() -> Net:
    net = Net()
    net.op("Relu", "x", out="y")
    return net
