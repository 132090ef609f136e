"""Fused layer normalizations, against ONNX Runtime's kernels and their formulas."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.gate.fused_operators import claim_fused
from tests.support.fused_models import (
    build_fused,
    draw,
    hold_fused,
    run_stock,
    run_written,
    write_out,
)

X, SKIP = draw(2, 4, 6), draw(2, 4, 6, seed=1)
WEIGHTS = {"scale": draw(6), "shift": draw(6, seed=1), "bias": draw(6, seed=2)}
IDS = np.random.default_rng(0).integers(0, 7, (2, 4)).astype(np.int32)


@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_a_simplified_one_divides_by_the_root_of_the_mean_square(axis: int) -> None:
    scale = draw(*X.shape[axis:])
    model = build_fused(
        "SimplifiedLayerNormalization", ["x", "scale"], {"x": X}, {"scale": scale},
        domain="", axis=axis, epsilon=1e-3,
    )  # fmt: skip
    axes = tuple(range(axis, 0)) if axis < 0 else tuple(range(axis, 3))
    expected = X / np.sqrt((X**2).mean(axes, keepdims=True) + 1e-3) * scale
    (stock,) = run_stock(model, {"x": X})
    (written,) = run_written(claim_fused(model, 18), {"x": X})
    np.testing.assert_allclose(stock, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(written, expected, rtol=1e-4, atol=1e-5)


def test_one_of_an_old_opset_is_onnxs_own() -> None:
    weights = {"scale": WEIGHTS["scale"], "shift": WEIGHTS["shift"]}
    model = build_fused(
        "LayerNormalization", ["x", *weights], {"x": X}, weights, domain="", axis=-1
    )
    model.opset_import[0].version = 13
    claimed = claim_fused(model, 13)
    claimed.opset_import[0].version = 18  # as the passes before this one leave it
    (expected,), (found,) = run_stock(model, {"x": X}), run_written(claimed, {"x": X})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("SkipLayerNormalization", ["x", "skip", "scale"]),
        ("SkipLayerNormalization", ["x", "skip", "scale", "shift", "bias"]),
        ("SkipSimplifiedLayerNormalization", ["x", "skip", "scale"]),
    ],
)
def test_one_that_adds_gives_the_sum_as_well(kind: str, inputs: list[str]) -> None:
    data = {"x": X, "skip": SKIP}
    weights = {name: WEIGHTS[name] for name in inputs if name in WEIGHTS}
    model = build_fused(kind, inputs, data, weights, ["y", "", "", "sum"], epsilon=1e-5)
    found, total = hold_fused(model, data)
    expected = X + SKIP + (WEIGHTS["bias"] if "bias" in inputs else 0)
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)
    centred = expected - (0 if "Simplified" in kind else expected.mean(-1, keepdims=True))
    root = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    shift = WEIGHTS["shift"] if "shift" in inputs else 0
    np.testing.assert_allclose(
        found, centred / root * WEIGHTS["scale"] + shift, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_one_of_embeddings_adds_three_tables(segments: bool, masked: bool) -> None:
    data = {"ids": IDS}
    weights = {"words": draw(7, 6), "places": draw(5, 6), "scale": draw(6), "shift": draw(6)}
    if segments:
        data["kinds"] = IDS % 2
        weights["segments"] = draw(2, 6)
    if masked:
        data["mask"] = (IDS > 2).astype(np.int32)
    inputs = [
        "ids", "kinds" if segments else "", "words", "places", "segments" if segments else "",
        "scale", "shift", "mask" if masked else "",
    ]  # fmt: skip
    model = build_fused(
        "EmbedLayerNormalization", inputs, data, weights, ["y", "counts", "sum"], epsilon=1e-5
    )
    _, counts, total = hold_fused(model, data)
    expected = weights["words"][IDS] + weights["places"][:4]
    if segments:
        expected = expected + weights["segments"][IDS % 2]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert counts.tolist() == ((IDS > 2).sum(1).tolist() if masked else [0, 0])


def test_statistics_that_are_read_are_refused() -> None:
    data = {"x": X, "skip": SKIP}
    model = build_fused(
        "SkipLayerNormalization", ["x", "skip", "scale"], data, {"scale": draw(6)}, ["y", "mean"]
    )
    with pytest.raises(UnsupportedModel, match=r"output 1 \('mean'\).*without the optimizer"):
        write_out(model)


def test_a_bias_that_the_kernel_ignores_is_refused() -> None:
    """ContribOperators.md adds it; if the kernel adds it as well, it can be written out."""
    data = {"x": X, "skip": SKIP}
    weights = {"scale": WEIGHTS["scale"], "bias": WEIGHTS["bias"]}
    model = build_fused(
        "SkipSimplifiedLayerNormalization",
        ["x", "skip", *weights],
        data,
        weights,
        ["y", "", "", "sum"],
    )
    np.testing.assert_array_equal(run_stock(model, data)[1], X + SKIP)
    with pytest.raises(UnsupportedModel, match=r"it has a bias, .*without the optimizer"):
        write_out(model)
