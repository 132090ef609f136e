"""Losses that users bring as ONNX models: values, gradients, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import SplitonnxError, StageFailed
from splitonnx.losses import Loss
from splitonnx.names import Target
from splitonnx.optimizers import SGD
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.verifications import verify
from tests.support.carried import BATCH, RECURRENT, build_recurrent
from tests.support.loss_references import build_network, differentiate, draw_weights, predict
from tests.support.loss_references import measure as measure_named

CUTS: list[dict[str, object]] = [
    {"at": None},
    {"at": "hidden"},
    {"at": "product", "tail_at": "hidden"},
]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def build_loss(
    nodes: Sequence[onnx.NodeProto] = (),
    *,
    rows: int | str = "batch",
    version: int = 18,
    score: str = "scores",
    result: Sequence[int] = (),
    extra: Sequence[str] = (),
) -> bytes:
    """Build a loss: the mean of margin * softplus(scores - goal), which has no gradient itself."""
    usual = [
        helper.make_node("Sub", [score, "goal"], ["gap"]),
        helper.make_node("Softplus", ["gap"], ["soft"]),
        helper.make_node("Mul", ["soft", "margin"], ["scaled"]),
        helper.make_node("ReduceMean", ["scaled"], ["value"], keepdims=0),
    ]
    graph = helper.make_graph(
        list(nodes) or usual,
        "own loss",
        [
            helper.make_tensor_value_info(score, FLOAT, [rows, 4]),
            helper.make_tensor_value_info("goal", FLOAT, [rows, 4]),
        ],
        [helper.make_tensor_value_info(name, FLOAT, result) for name in ("value", *extra)],
        [numpy_helper.from_array(np.array([1, 2, 3, 4], np.float32), "margin")],
    )
    opsets = [helper.make_opsetid("", version)]
    content: bytes = helper.make_model(
        graph, ir_version=8, opset_imports=opsets
    ).SerializeToString()
    return content


def draw_data(rows: int = 8) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(9)
    shapes = {"x": (rows, 3), "goal": (rows, 4)}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def measure(weights: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]) -> float:
    soft = np.logaddexp(0, predict(weights, data["x"]) - data["goal"])
    return float((soft * np.array([1, 2, 3, 4])).mean())


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("where", CUTS, ids=["whole", "vanilla", "u-shape"])
@pytest.mark.parametrize("version", [13, 18, 21])
def test_a_loss_of_ones_own_is_differentiated_and_evaluated(
    where: Mapping[str, object], target: Target, version: int
) -> None:
    data = draw_data()
    bundle = cut(
        build_network(),
        loss=Loss(kind="from-file", graph=build_loss(version=version)),
        optimizer=SGD(lr=1.0),
        client_target=target,
        server_target=target,
        check=False,
        **where,  # type: ignore[arg-type]
    )
    link = None
    if bundle.server is not None:
        link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    weights = {name: w.astype(np.float64) for name, w in draw_weights().items()}
    with Client(bundle.client, link, threads=1) as client:
        evaluated = client.evaluate(data, batch_size=3)
        found = client.step(data)
        after = dict(client.state())
        if link is not None:
            link.drain()
            after |= link.executor.state()
    assert evaluated == {"loss": pytest.approx(measure(weights, data), abs=1e-6)}
    assert float(found["loss"]) == pytest.approx(measure(weights, data), abs=1e-6)
    assert after.keys() == weights.keys()  # the loss's own constants are not trained
    for name, slope in differentiate(lambda at: measure(at, data), weights).items():
        np.testing.assert_allclose(weights[name] - after[name], slope, atol=1e-6)
    assert verify(bundle, data, batch_size=4, steps=2).ok


@pytest.mark.parametrize("name", ["", "loss", "same"])
@pytest.mark.parametrize("result", ["loss", "value"])
def test_a_loss_may_have_any_names_of_nodes_and_of_its_result(result: str, name: str) -> None:
    own = onnx.load_from_string(build_loss())
    own.graph.node[-1].output[0] = own.graph.output[0].name = result
    for node in own.graph.node:
        node.name = name
    data = draw_data()
    loss = Loss(kind="from-file", graph=own.SerializeToString())
    bundle = cut(build_network(), at=None, loss=loss, optimizer=SGD(lr=1.0))
    weights = {name: w.astype(np.float64) for name, w in draw_weights().items()}
    with Client(bundle.client, threads=1) as client:
        evaluated = client.evaluate(data, batch_size=3)
        found = client.step(data)
        after = client.state()
    assert evaluated == {"loss": pytest.approx(measure(weights, data), abs=1e-6)}
    assert float(found["loss"]) == pytest.approx(measure(weights, data), abs=1e-6)
    for name, slope in differentiate(lambda at: measure(at, data), weights).items():
        np.testing.assert_allclose(weights[name] - after[name], slope, atol=1e-6)


def test_it_is_read_from_a_file_and_added_to_others(tmp_path: Path) -> None:
    (tmp_path / "own.onnx").write_bytes(build_loss())
    losses = [Loss(), Loss(kind=str(tmp_path / "own.onnx"), weight=3.0)]
    bundle = cut(build_network(), at=None, loss=losses)
    data = {**draw_data(), "labels": np.arange(8) % 4}
    with Client(bundle.client, threads=1) as client:
        found = client.evaluate(data, batch_size=3)
    weights = {name: w.astype(np.float64) for name, w in draw_weights().items()}
    own, scores = measure(weights, data), predict(weights, data["x"])
    usual = -(scores - np.logaddexp.reduce(scores, 1, keepdims=True))[
        range(8), data["labels"]
    ].mean()
    assert found["loss.own"] == pytest.approx(own, abs=1e-6)
    assert found["loss.scores"] == pytest.approx(usual, abs=1e-6)
    assert found["loss"] == pytest.approx(usual + 3 * own, abs=1e-6)
    assert [loss.name for loss in bundle.manifest.recipe.losses] == ["scores", "own"]


def test_labels_that_are_no_classes_reach_no_kernel() -> None:
    nodes = [helper.make_node("Cast", ["goal"], ["whole"], to=INT64),
             helper.make_node("ReduceMax", ["whole"], ["label"], axes=[1], keepdims=0),
             helper.make_node("SoftmaxCrossEntropyLoss", ["scores", "label"], ["value"]),
             helper.make_node("Identity", ["margin"], ["unused"])]  # fmt: skip
    bundle = cut(
        build_network(), at=None, loss=Loss(kind="from-file", graph=build_loss(nodes, version=13))
    )
    data = draw_data()
    for wrong in (4, -1, 10**6):
        data["goal"][:] = wrong
        for work in ("step", "evaluate"):
            with Client(bundle.client, threads=1) as client, pytest.raises(StageFailed):
                getattr(client, work)(data)
    data["goal"][:] = 3
    with Client(bundle.client, threads=1) as client:
        assert client.evaluate(data)["loss"] == pytest.approx(float(client.step(data)["loss"]))


PADDING = -100


def build_class_loss(kind: str, weights: Sequence[float]) -> bytes:
    """Build a cross-entropy as PyTorch exports it, in one node or two."""
    names = ["labels", *(["shares"] if weights else [])]
    settings: dict[str, Any] = {"ignore_index": PADDING, "reduction": "mean"}
    nodes = [helper.make_node(kind, ["scores", *names], ["value"], **settings)]
    if kind == "NegativeLogLikelihoodLoss":
        nodes = [helper.make_node("LogSoftmax", ["scores"], ["logs"], axis=1),
                 helper.make_node(kind, ["logs", *names], ["value"], **settings)]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "own loss",
        [
            helper.make_tensor_value_info("scores", FLOAT, ["N", 4]),
            helper.make_tensor_value_info("labels", INT64, ["N"]),
        ],
        [helper.make_tensor_value_info("value", FLOAT, [])],
        [numpy_helper.from_array(np.array(weights, np.float32), "shares")] if weights else [],
    )
    content: bytes = helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)]
    ).SerializeToString()
    return content


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("kind", ["SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"])
@pytest.mark.parametrize("weights", [(), (0.5, 2.0, 0.0, 1.0)], ids=["", "weighted"])
def test_a_batch_of_which_nothing_counts_is_0_in_a_loss_of_ones_own(
    target: Target, kind: str, weights: Sequence[float]
) -> None:
    """As for the losses that have names: 0, not NaN, on both targets."""
    bundle = cut(
        build_network(),
        at=None,
        loss=Loss(kind="from-file", graph=build_class_loss(kind, weights)),
        optimizer=SGD(lr=1.0),
        client_target=target,
        check=False,
    )
    x = draw_data()["x"]
    nothing = [np.full(8, PADDING), *([np.full(8, 2)] if weights else [])]
    with Client(bundle.client, threads=1) as client:
        before = dict(client.state())
        for labels in nothing:
            assert client.evaluate({"x": x, "labels": labels}) == {"loss": 0}
            assert float(client.step({"x": x, "labels": labels})["loss"]) == 0
        for name, weight in client.state().items():
            np.testing.assert_array_equal(weight, before[name])
        some = np.array([0, PADDING, 2, 3, PADDING, 1, 0, 0])
        data = {"x": x, "labels": some}
        found = [client.evaluate(data, batch_size=size)["loss"] for size in (1, 3, 8)]
    scores = predict({name: w.astype(np.float64) for name, w in draw_weights().items()}, x)
    loss = Loss(ignore_index=PADDING, class_weights=tuple(weights))
    wanted = measure_named(loss, scores, {"labels": some})[0]
    assert found == pytest.approx([wanted] * 3, abs=1e-6)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no model", "not a"),
        (build_loss(score="logits"), "its inputs are 'logits', 'goal'"),
        (build_loss(rows=4), r"its input 'scores' is FLOAT \[4, 4\].*is FLOAT \[N, 4\]"),
        (build_loss([helper.make_node("Sub", ["scores", "goal"], ["value"])], result=["batch", 4]),  # type: ignore[list-item]
         "not a float32 scalar"),
        (build_loss([helper.make_node("RandomNormalLike", ["scores"], ["noise"]),
                     helper.make_node("ReduceMean", ["noise"], ["mean"], keepdims=0),
                     helper.make_node("ReduceMean", ["scores"], ["all"], keepdims=0),
                     helper.make_node("Add", ["mean", "all"], ["value"])], version=13),
         "it draws random numbers"),
        (build_loss([helper.make_node("ReduceMean", ["scores"], ["value"], keepdims=0),
                     helper.make_node("ReduceMean", ["goal"], ["other"], keepdims=0)],
                    extra=["other"]), "it has 2 outputs"),
        (build_loss([helper.make_node("Nothing", ["scores"], ["value"])]), "Nothing"),
    ],
    ids=["bytes", "names", "fixed batch", "no scalar", "noise", "two outputs", "operator"],
)  # fmt: skip
def test_a_file_that_is_no_loss_of_the_model_is_refused(content: bytes, told: str) -> None:
    with pytest.raises(SplitonnxError, match=told):
        cut(build_network(), at=None, loss=Loss(kind="from-file", graph=content))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"labels": "goal"}, "--labels: a loss from-file reads the arrays that its inputs name"),
        ({"sample_weights": "w"}, "--sample-weights: a loss from-file"),
        ({"label_smoothing": 0.1}, "--label-smoothing is for cross-entropy"),
        ({"output": "hidden"}, "does not read output 'hidden'; it reads 'scores'"),
        ({"graph": None}, "has a graph, the bytes of a model"),
        ({"graph": bytes(5 << 20)}, "at most 4 MiB"),
    ],
)
def test_settings_that_a_file_does_not_have_are_refused(
    settings: dict[str, object], told: str
) -> None:
    given = {"kind": "from-file", "graph": build_loss(), **settings}
    with pytest.raises(SplitonnxError, match=told):
        cut(build_network(), at=None, loss=Loss(**given))  # type: ignore[arg-type]


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(SplitonnxError, match=r"--loss absent\.onnx: No such file"):
        cut(build_network(), at=None, loss="absent.onnx")


def test_a_state_is_no_array_of_a_loss() -> None:
    """The loss would read data where the model reads what it keeps."""
    node = helper.make_node("Sub", ["y", "h_in"], ["gap"])
    graph = helper.make_graph(
        [node, helper.make_node("ReduceMean", ["gap"], ["value"], keepdims=0)],
        "own loss",
        [helper.make_tensor_value_info(name, FLOAT, ["N", 2]) for name in ("y", "h_in")],
        [helper.make_tensor_value_info("value", FLOAT, [])],
    )
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    loss = Loss(kind="from-file", graph=content.SerializeToString())
    with pytest.raises(SplitonnxError, match="it reads the model's input 'h_in'"):
        cut(build_recurrent(), at=None, loss=loss, dims={"N": BATCH}, states=RECURRENT)
