"""What tests of elementwise rewrites share: inputs from a range, slopes at single values."""

from __future__ import annotations

from typing import Any

import numpy as np

from splitonnx.partitioner.partitions import cut
from tests.support.case_trials import TARGETS, run_step
from tests.support.derivatives import assert_differentiable, close_net
from tests.support.zoo import Net


def draw(low: float, high: float, *shape: int) -> np.ndarray:
    return np.random.default_rng(4).uniform(low, high, shape).astype(np.float32)


def weigh(net: Net, *shape: int) -> str:
    """x times a weight close to one, so that what follows sees the range that x was drawn from."""
    weight = net.constant("w", draw(0.9, 1.0, *shape))
    return net.op("Mul", "x", weight, out="h")


def find_slopes(
    kind: str, values: list[float], *inputs: np.ndarray, **attributes: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return value and slope of a function of one parameter at each value, on both targets."""
    net = Net(opset=20)
    parameter = net.constant("p", np.array(values, np.float32))
    others = [net.constant(f"o{i}", array) for i, array in enumerate(inputs)]
    net.op(kind, parameter, *others, out="y", **attributes)
    net.op("Mul", "y", "x", out="product")
    net.op("ReduceSum", "product", out="total", keepdims=0)
    data = {"x": np.ones((1, len(values)), np.float32)}
    model = close_net(net, data, "total")
    found = []
    for target in TARGETS:
        bundle = cut(model, at=None, loss="from-model", client_target=target, train=["^p$"])
        results = run_step(bundle, data)
        found.append((results["loss"], results["p_grad"]))
    return found


def hold_dynamic_batch(kind: str, attributes: dict[str, Any], low: float, high: float) -> None:
    """Hold a function's gradient, drawn from a range, against numeric differences."""
    net = Net(opset=20 if kind == "Gelu" else 18)
    net.op(kind, weigh(net, 4, 5), out="y", **attributes)
    assert_differentiable(net, {"x": draw(low, high, 3, 4, 5)})


def hold_slopes(kind: str, values: list[float], expected: list[float]) -> None:
    """Hold the slopes at single values, and that no value overflows."""
    for loss, slopes in find_slopes(kind, values):
        assert np.isfinite(loss)
        np.testing.assert_allclose(slopes, expected, rtol=1e-3, atol=1e-30)
