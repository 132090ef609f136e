"""Random operators: numbers that seed, step and node determine, split as unsplit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from splitonnx.errors import UnsupportedModel
from splitonnx.manifests import KEY
from splitonnx.names import Target
from splitonnx.partitioner.graphs.random_numbers import seed_random_operators
from splitonnx.partitioner.partitions import cut
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
