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
from splitonnx.optimizers import SGD
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
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
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


MEAN, VARIANCE = np.array([0.5, -0.25, 0.0], np.float32), np.array([1.0, 0.5, 2.0], np.float32)


def build_chained(*, copies: bool, are_outputs: bool) -> onnx.ModelProto:
    """Build two calls of one module, whose second reads the statistics that the first updated."""
    stored = {
        "w": np.random.default_rng(0).normal(0, 1, (5, 3)).astype(np.float32),
        "scale": np.array([1.0, 2.0, 0.5], np.float32),
        "bias": np.array([0.0, 0.5, 1.0], np.float32),
        "mean": MEAN,
        "var": VARIANCE,
    }
    nodes, read = [], ["mean", "var"]
    for place, name in enumerate("ab"):
        nodes.append(helper.make_node("MatMul", [name, "w"], [f"h_{name}"], f"h_{name}"))
        made = [f"mean_{name}", f"var_{name}"]
        nodes.append(
            helper.make_node(
                "BatchNormalization", [f"h_{name}", "scale", "bias", *read], [f"n_{name}", *made],
                f"norm_{name}", training_mode=1, momentum=0.75,
            )
        )  # fmt: skip
        read = made
        if copies and place == 0:
            read = [f"copied_{one}" for one in made]
            nodes += [
                helper.make_node("Identity", [a], [b], b) for a, b in zip(made, read, strict=True)
            ]
    nodes.append(helper.make_node("Concat", ["n_a", "n_b"], ["y"], "y", axis=1))
    updated = [helper.make_tensor_value_info(name, FLOAT, [3]) for name in read]
    graph = helper.make_graph(
        nodes,
        "chained",
        [helper.make_tensor_value_info(name, FLOAT, ["N", 5]) for name in "ab"],
        [helper.make_tensor_value_info("y", FLOAT, ["N", 6]), *(updated if are_outputs else [])],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def read_weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {
        one.name: np.asarray(onnx.numpy_helper.to_array(one), np.float64)
        for one in model.graph.initializer
    }


@pytest.mark.parametrize("mode", [None, "train", "frozen"])
@pytest.mark.parametrize(("copies", "are_outputs"), [(False, False), (True, False), (False, True)])
def test_statistics_that_a_graph_hands_from_node_to_node_are_kept(
    mode: BatchNormModes, copies: bool, are_outputs: bool
) -> None:
    """Computed with numpy: each call follows the one before it, or both use the stored ones."""
    model = build_chained(copies=copies, are_outputs=are_outputs)
    data = {k: np.random.default_rng(ord(k)).normal(1, 2, (8, 5)).astype(np.float32) for k in "ab"}
    bundle = cut(
        model, at=None, loss="mse", output="y", batchnorm=mode, optimizer=SGD(lr=1e-12), check=False
    )
    with Client(bundle.client, threads=1) as client:
        client.step({**data, "labels": np.zeros((8, 6), np.float32)})
        state, scores = client.state(), client.predict(data)["y"]
    weights = read_weights(model)
    mean, variance = MEAN.astype(np.float64), VARIANCE.astype(np.float64)
    for values in data.values() if mode != "frozen" else ():
        hidden = values @ weights["w"]
        mean = 0.75 * mean + 0.25 * hidden.mean(0)
        variance = 0.75 * variance + 0.25 * hidden.var(0)
    np.testing.assert_allclose(state["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["var"], variance, rtol=1e-5)
    expected = [
        (values @ weights["w"] - mean) / np.sqrt(variance + 1e-5) * weights["scale"]
        + weights["bias"]
        for values in data.values()
    ]
    np.testing.assert_allclose(scores, np.concatenate(expected, 1), rtol=1e-4, atol=1e-5)


def test_statistics_that_are_computed_are_refused_with_a_mode_that_takes_them() -> None:
    model = build_chained(copies=False, are_outputs=True)
    model.graph.node[1].input[3] = "doubled"
    model.graph.node.insert(0, helper.make_node("Add", ["mean", "mean"], ["doubled"], "double"))
    with pytest.raises(UnsupportedModel, match=r"'doubled' .* train with --batchnorm frozen"):
        cut(model, at=None, loss="mse", output="y", check=False)
    bundle = cut(model, at=None, loss="mse", output="y", batchnorm="frozen", check=False)
    data = {name: np.ones((2, 5), np.float32) for name in "ab"}
    with Client(bundle.client, threads=1) as client:
        client.step({**data, "labels": np.zeros((2, 6), np.float32)})
