"""Random operators: numbers that seed, step and node determine, split as unsplit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from splitonnx.bundles import Bundle
from splitonnx.errors import UnsupportedModel
from splitonnx.manifests import KEY
from splitonnx.names import Target
from splitonnx.partitioner.graphs.random_numbers import correct_draws, seed_random_operators
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.verifications import verify
from tests.support.derivatives import close_net
from tests.support.zoo import Net

X = np.random.default_rng(0).standard_normal((500, 40), np.float32)


def draw(kind: str, *key: int, x: np.ndarray = X, **attributes: Any) -> np.ndarray:
    """Draw once with the operators that stand for a random one."""
    inputs = [] if kind in ("RandomNormal", "RandomUniform") else ["x"]
    node = helper.make_node(kind, inputs, ["y"], name="random", **attributes)
    graph = helper.make_graph(
        [node],
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", x.shape[1]])],
        [onnx.ValueInfoProto(name="y")],
    )
    opsets = [helper.make_opsetid("", 18)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    correct_draws(model.graph)
    seed_random_operators(model.graph)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    result: np.ndarray = session.run(None, {"x": x, KEY: np.array(key, np.int64)})[0]
    return result


@pytest.mark.parametrize(
    ("kind", "attributes", "mean", "deviation"),
    [
        ("RandomUniform", {"shape": [500, 40], "low": -1.0, "high": 3.0}, 1.0, 4 / 12**0.5),
        ("RandomUniformLike", {}, 0.5, 1 / 12**0.5),
        ("RandomNormal", {"shape": [500, 40], "mean": 2.0, "scale": 0.5}, 2.0, 0.5),
        ("RandomNormalLike", {"seed": 3.0}, 0.0, 1.0),
    ],
)
def test_numbers_have_the_moments_that_were_asked_for(
    kind: str, attributes: dict[str, Any], mean: float, deviation: float
) -> None:
    drawn = draw(kind, 1, 2, 3, **attributes)
    assert drawn.shape == (500, 40)
    assert abs(drawn.mean() - mean) < 0.03 * deviation
    assert abs(drawn.std() - deviation) < 0.02 * deviation
    assert np.isfinite(drawn).all()


def test_normal_numbers_have_normal_tails() -> None:
    drawn = np.sort(draw("RandomNormalLike", 0, 0, 0).ravel())
    assert abs((np.abs(drawn) < 1.0).mean() - 0.6827) < 0.01
    assert abs((np.abs(drawn) < 2.0).mean() - 0.9545) < 0.005


def test_the_key_alone_determines_the_numbers() -> None:
    first = draw("RandomNormalLike", 1, 2, 3)
    np.testing.assert_array_equal(first, draw("RandomNormalLike", 1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert (
            abs(np.corrcoef(first.ravel(), draw("RandomNormalLike", *other).ravel())[0, 1]) < 0.03
        )
    assert correlate(first, draw("RandomNormalLike", 1, 2, 3, seed=1.0)) < 0.03


def correlate(one: np.ndarray, other: np.ndarray) -> float:
    return abs(float(np.corrcoef(one.ravel(), other.ravel())[0, 1]))


def test_bernoulli_follows_its_chances() -> None:
    chances = np.tile(np.linspace(0, 1, 40, dtype=np.float32), (2000, 1))
    drawn = draw("Bernoulli", 1, 2, 3, x=chances, dtype=TensorProto.INT32)
    assert drawn.dtype == np.int32
    np.testing.assert_allclose(drawn.mean(0), chances[0], atol=0.05)
    assert (drawn[:, 0] == 0).all()
    assert (drawn[:, -1] == 1).all()


def test_multinomial_follows_its_weights() -> None:
    weights = np.log(np.tile(np.array([1, 2, 5, 2], np.float32), (300, 1)))
    drawn = draw("Multinomial", 1, 2, 3, x=weights, sample_size=100)
    assert drawn.dtype == np.int32
    assert drawn.shape == (300, 100)
    counts = np.bincount(drawn.ravel(), minlength=4) / drawn.size
    np.testing.assert_allclose(counts, [0.1, 0.2, 0.5, 0.2], atol=0.01)


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("at", ["mean", "noisy", "z"])
def test_a_model_that_draws_trains_split_as_unsplit(target: Target, at: str) -> None:
    net = Net()
    mean = net.op("MatMul", "x", net.weight("w", 40, 6), out="mean")
    noise = net.op("RandomNormalLike", mean, out="noise")
    shift = net.op("RandomUniform", out="shift", shape=[6], low=-0.1, high=0.1)
    noisy = net.op("Add", mean, noise, out="noisy")
    net.op("Add", net.op("Tanh", noisy, out="t"), shift, out="z")
    net.op("MatMul", "z", net.weight("v", 6, 3), out="y")
    model = close_net(net, {"x": X})
    bundle = cut(model, at=at, loss="mse", client_target=target, server_target=target)
    labels = np.random.default_rng(1).standard_normal((32, 3), np.float32)
    verification = verify(bundle, {"x": X[:32], "labels": labels}, steps=3, batch_size=8)
    assert verification.largest_difference <= 1e-6
    assert len({step.whole_loss for step in verification.steps}) == 3


def test_a_multinomial_without_a_known_rank_is_refused() -> None:
    node = ir.node("Multinomial", [ir.Value(name="x")], name="dice")
    node.outputs[0].name = "y"
    graph = ir.Graph(list(node.inputs), node.outputs, nodes=[node], opset_imports={"": 18})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match=r"'dice' \(Multinomial\): its input is not known"):
        seed_random_operators(graph)


FLOAT = TensorProto.FLOAT


def build_gated(gate: onnx.NodeProto, *more: onnx.NodeProto) -> onnx.ModelProto:
    """Build a model whose output is what ``gate`` draws with the chances ``p``, plus zeros."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "h"),
        *more,
        gate,
        helper.make_node("Cast", ["gate"], ["float_gate"], "float", to=FLOAT),
        helper.make_node("Mul", ["h", "zero"], ["still"], "still"),
        helper.make_node("Add", ["still", "float_gate"], ["z"], "z"),
        helper.make_node("MatMul", ["z", "v"], ["y"], "y"),
    ]
    random = np.random.default_rng(0)
    stored = {
        "w": random.standard_normal((3, 5)).astype(np.float32),
        "v": np.eye(5, dtype=np.float32),
        "zero": np.zeros((), np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "gated",
        [
            helper.make_tensor_value_info("x", FLOAT, ["N", 3]),
            helper.make_tensor_value_info("p", FLOAT, ["N", 5]),
        ],
        [helper.make_tensor_value_info("y", FLOAT, ["N", 5])],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def build_branches() -> onnx.ModelProto:
    """Build the model with its Bernoulli in the branch of an If that is always taken."""
    made = [helper.make_tensor_value_info("made", FLOAT, None)]
    drawn = helper.make_node("Bernoulli", ["p"], ["made"], "draw")
    other = helper.make_node("Identity", ["p"], ["made"], "pass")
    chosen = helper.make_node(
        "If", ["is_small"], ["gate"], "choice",
        then_branch=helper.make_graph([drawn], "then", [], made),
        else_branch=helper.make_graph([other], "else", [], made),
    )  # fmt: skip
    return build_gated(
        chosen,
        helper.make_node("ReduceMin", ["x"], ["least"], "least", keepdims=0),
        helper.make_node("Less", ["least", "far"], ["is_small"], "less"),
        helper.make_node("Constant", [], ["far"], "far", value_float=1e9),
    )


def open_client(bundle: Bundle) -> Client:
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    return Client(bundle.client, link, threads=1)


def sort_constants_first(model: onnx.ModelProto) -> onnx.ModelProto:
    nodes = sorted(model.graph.node, key=lambda node: node.op_type != "Constant")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


CHANCES = np.array([0.0, 0.1, 0.5, 0.8, 1.0], np.float32)
SAMPLES = 4000
GATED = {
    "Bernoulli": build_gated(helper.make_node("Bernoulli", ["p"], ["gate"], "draw")),
    "with a seed": build_gated(helper.make_node("Bernoulli", ["p"], ["gate"], "draw", seed=3.0)),
    "of truth values": build_gated(
        helper.make_node("Bernoulli", ["p"], ["gate"], "draw", dtype=TensorProto.BOOL)
    ),
    "in a branch": sort_constants_first(build_branches()),
}


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("name", GATED)
def test_a_bernoulli_follows_its_chances_in_every_phase(name: str, target: Target) -> None:
    """As numpy draws; ONNX Runtime's own kernel draws 1 with probability 1 - p."""
    model = GATED[name]
    x = {"x": np.zeros((SAMPLES, 3), np.float32), "p": np.tile(CHANCES, (SAMPLES, 1))}
    usual = np.random.default_rng(1).binomial(1, CHANCES, (SAMPLES, 5)).mean(0)
    at = "z" if name == "in a branch" else ["h", "p"]  # at the client, or at the server
    bundle = cut(model, at=at, loss="l1", client_target=target, server_target=target)
    labels = np.zeros((SAMPLES, 5), np.float32)
    with open_client(bundle) as client:
        drawn = client.predict(x, batch_size=SAMPLES)["y"]
        losses = [
            client.evaluate({**x, "labels": labels}, batch_size=SAMPLES)["loss"],
            client.step({**x, "labels": labels})["loss"],
        ]
    session = onnxruntime.InferenceSession(merge(bundle))
    merged = session.run(None, x)[0]
    for made in (drawn, merged):
        np.testing.assert_array_equal(np.unique(made), [0, 1])
        np.testing.assert_allclose(made.mean(0), usual, atol=0.05)
        assert (made[:, 0] == 0).all()
        assert (made[:, -1] == 1).all()
    assert losses == [pytest.approx(usual.mean(), abs=0.02)] * 2


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("RandomNormalLike", {"scale": 0.0, "mean": 2.5}),
        ("RandomNormal", {"scale": 0.0, "mean": 2.5, "shape": [5]}),
        ("RandomUniformLike", {"low": 2.5, "high": 2.5}),
    ],
)
def test_noise_that_is_off_is_its_mean(kind: str, attributes: dict[str, Any]) -> None:
    """ONNX Runtime's kernel ends the process at a scale of 0."""
    inputs = ["p"] if kind.endswith("Like") else []
    model = build_gated(helper.make_node(kind, inputs, ["gate"], "draw", **attributes))
    bundle = cut(model, at="z", loss="l1")
    x = {"x": np.zeros((4, 3), np.float32), "p": np.zeros((4, 5), np.float32)}
    with open_client(bundle) as client:
        np.testing.assert_array_equal(client.predict(x)["y"], np.full((4, 5), 2.5))
        labels = np.zeros((4, 5), np.float32)
        assert client.step({**x, "labels": labels})["loss"] == 2.5


@pytest.mark.parametrize(
    ("kind", "attributes", "message"),
    [
        ("RandomNormalLike", {"scale": -1.0}, "its scale is -1, .* a scale of 1, which draws"),
        ("RandomNormalLike", {"scale": float("nan")}, "its scale is nan, .* with a number"),
        ("RandomUniformLike", {"low": 2.0}, "from 2 to 1, .* the smaller number as 'low'"),
    ],
)
@pytest.mark.parametrize("in_body", [False, True])
def test_a_distribution_that_would_end_the_process_is_refused_by_name(
    kind: str, attributes: dict[str, Any], message: str, in_body: bool
) -> None:
    node = helper.make_node(kind, ["p"], ["gate"], "draw", **attributes)
    model = build_gated(node)
    if in_body:
        model = sort_constants_first(build_branches())
        (choice,) = (node for node in model.graph.node if node.op_type == "If")
        body = next(held.g for held in choice.attribute if held.name == "then_branch")
        body.node[0].CopyFrom(node)
        body.node[0].output[0] = "made"
    with pytest.raises(UnsupportedModel, match=rf"node 'draw' \({kind}\): .*{message}"):
        cut(model, at="z", loss="l1")
