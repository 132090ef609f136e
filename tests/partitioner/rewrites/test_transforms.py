"""Fourier transforms over their attributes, against numpy.fft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from onnx import helper

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.partitions import cut
from tests.support.differentiations import hold_gradients
from tests.support.zoo import FLOAT, Net

Arrays = Mapping[str, np.ndarray]


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(0, 1, shape).astype(np.float32)


def join(x: np.ndarray) -> np.ndarray:
    return x[..., 0] if x.shape[-1] == 1 else x[..., 0] + 1j * x[..., 1]


def part(z: np.ndarray) -> np.ndarray:
    return np.stack([z.real, z.imag], -1)


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("axis", [1, -2])
@pytest.mark.parametrize("length", [None, 4, 9])
@pytest.mark.parametrize(
    ("mode", "parts"), [("", 1), ("", 2), ("inverse", 1), ("inverse", 2), ("onesided", 1)]
)
def test_dft(opset: int, axis: int, length: int | None, mode: str, parts: int) -> None:
    arrays: dict[str, np.ndarray] = {"x": draw(2, 6, 5, parts)}
    inputs = ["x"]
    attributes: dict[str, Any] = {mode: 1} if mode else {}
    if length is not None:
        inputs.append("length")
        arrays["length"] = np.array(length)
    if opset == 20:
        inputs += [""] * (2 - len(inputs)) + ["axis"]
        arrays["axis"] = np.array(axis)
    else:
        attributes["axis"] = axis

    def evaluate(feeds: Arrays) -> Arrays:
        along = axis if axis > 0 else 2
        transform: Any = np.fft.ifft if mode == "inverse" else np.fft.fft
        found = transform(join(feeds["x"]), length, axis=along)
        if mode == "onesided":
            found = np.take(found, range(found.shape[along] // 2 + 1), along)
        return {"y": part(found)}

    node = helper.make_node("DFT", inputs, ["y"], **attributes)
    other = {"x": 0 if axis == 1 else 1}
    hold_gradients([node], arrays, ["y"], evaluate=evaluate, opset=opset, dynamic=other, entries=2)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize(
    ("shape", "onesided"),
    [((2, 20), 0), ((2, 20), 1), ((2, 20, 1), 0), ((2, 20, 1), 1), ((2, 20, 2), 0)],
)
def test_stft(windowed: bool, shape: tuple[int, ...], onesided: int) -> None:
    inputs = ["x", "step", "window" if windowed else "", "length"]
    arrays = {"x": draw(*shape), "step": np.array(3), "length": np.array(8)}
    if windowed:
        arrays["window"] = np.abs(draw(8))

    def evaluate(feeds: Arrays) -> Arrays:
        x = feeds["x"] if feeds["x"].ndim == 3 else feeds["x"][..., None]
        window = feeds.get("window", np.ones(8))
        frames = np.stack([join(x)[:, i : i + 8] for i in range(0, 20 - 8 + 1, 3)], 1)
        found = np.fft.fft(frames * window)
        return {"y": part(found[..., :5] if onesided else found)}

    node = helper.make_node("STFT", inputs, ["y"], onesided=onesided)
    for dynamic in ({"x": 0}, {"x": 1}):
        hold_gradients(
            [node],
            arrays,
            ["y"],
            evaluate=evaluate,
            dynamic=dynamic,
            constants=["window"],
            entries=3,
        )


def test_a_transform_of_unknown_length_is_refused() -> None:
    net = Net()
    scaled = net.op("Mul", "x", net.weight("scale", 2), out="scaled")
    net.op("DFT", scaled, out="y", axis=1)
    model = net.finish({"x": (FLOAT, ["N", "T", 2])}, "y", "T", 2)
    with pytest.raises(UnsupportedModel, match="is not known in advance"):
        cut(model, at=None, loss="mse")
