"""Fused attention and rotary embeddings, against ONNX Runtime's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from splitonnx.errors import UnsupportedModel
from tests.support.fused_models import build_fused, draw, hold_fused, run_stock, write_out

BATCH, LENGTH, WIDTH, HEADS = 2, 5, 8, 2
X = draw(BATCH, LENGTH, WIDTH)
MASKS = {
    "": None,
    "lengths": np.array([5, 3], np.int32),
    "positions": np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]], np.int32),
    "pairs": np.tril(np.ones((BATCH, LENGTH, LENGTH), np.int32)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [0, 1])
def test_attention_is_softmax_of_products(mask: str, causal: int) -> None:
    data, kept = {"x": X}, MASKS[mask]
    if kept is not None:
        data["mask"] = kept
    weights = {"w": draw(WIDTH, 3 * WIDTH), "b": draw(3 * WIDTH)}
    model = build_fused(
        "Attention", ["x", "w", "b", "mask" if mask else ""], data, weights,
        num_heads=HEADS, unidirectional=causal,
    )  # fmt: skip
    (found,) = hold_fused(model, data)
    np.testing.assert_allclose(
        found, _attend(X @ weights["w"] + weights["b"], kept, causal), atol=1e-4
    )


BOTH = np.array([5, 4, 2, 1], np.int32)
SUMS = np.array([5, 3, 0, 5, 10, 0, 5, 8], np.int32)


@pytest.mark.parametrize("rows", ["N", BATCH])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mask", [BOTH, SUMS, np.array([5, 3], np.int32)])
def test_a_mask_of_one_dimension_may_hold_more_than_ends(
    mask: np.ndarray, causal: int, rows: int | str
) -> None:
    """It holds ends and then starts, or ends and then sums that ONNX Runtime's kernel ignores."""
    data = {"x": X, "mask": mask}
    model, weights = _build_masked(data, rows, "M" if rows == "N" else len(mask), causal)
    (found,) = hold_fused(model, data)
    places, starts = np.arange(LENGTH), BOTH[BATCH:] if mask is BOTH else np.zeros(BATCH)
    kept = (places < mask[:BATCH, None]) & (places >= starts[:, None])
    wanted = _attend(X @ weights["w"] + weights["b"], kept.astype(np.float32), causal)
    np.testing.assert_allclose(found, wanted, atol=1e-3)  # -10000 rounds scores of masked rows


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_a_mask_of_another_size_is_refused(count: int) -> None:
    data = {"x": X, "mask": np.full(count, 4, np.int32)}
    fixed, _ = _build_masked(data, BATCH, count)
    with pytest.raises(UnsupportedModel, match=rf"'fused' \(Attention\).*{count} numbers.*of 2,"):
        write_out(fixed)
    opened, _ = _build_masked(data, "N", "M")
    with pytest.raises(Exception, match="shall have length of batch_size or"):
        run_stock(opened, data)
    with pytest.raises(Exception, match="fused/mask_index_must_have_batch_or_2_batch"):
        run_stock(write_out(opened), data)


def _build_masked(
    data: dict[str, np.ndarray], rows: int | str, count: int | str, causal: int = 0
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Build attention with a mask of one dimension, of sizes that are declared."""
    weights = {"w": draw(WIDTH, 3 * WIDTH), "b": draw(3 * WIDTH)}
    model = build_fused(
        "Attention", ["x", "w", "b", "mask"], data, weights,
        num_heads=HEADS, unidirectional=causal,
    )  # fmt: skip
    for value, size in zip(model.graph.input, (rows, count), strict=True):
        first = value.type.tensor_type.shape.dim[0]
        first.CopyFrom(
            onnx.TensorShapeProto.Dimension(dim_param=size)
            if isinstance(size, str)
            else onnx.TensorShapeProto.Dimension(dim_value=size)
        )
    return model, weights


def test_attention_takes_a_shift_sizes_and_a_scale() -> None:
    data = {"x": X, "shift": draw(BATCH, HEADS, LENGTH, LENGTH)}
    weights = {"w": draw(WIDTH, 20), "b": draw(20)}
    model = build_fused(
        "Attention", ["x", "w", "b", "", "", "shift"], data, weights,
        num_heads=HEADS, qkv_hidden_sizes=[8, 8, 4], scale=0.3,
    )  # fmt: skip
    hold_fused(model, data)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_attention_over_other_keys(biased: bool, shifted: bool) -> None:
    data, weights = _draw_keys(), {"b": draw(3 * WIDTH)} if biased else {}
    if shifted:
        data["shift"] = draw(BATCH, HEADS, 3, LENGTH)
    inputs = ["q", "k", "v", "b" if biased else "", "", "shift" if shifted else ""]
    hold_fused(build_fused("MultiHeadAttention", inputs, data, weights, num_heads=HEADS), data)


def test_a_mask_that_the_kernel_ignores_is_refused() -> None:
    """ContribOperators.md adds it; if the kernel adds it as well, it can be written out."""
    data = {**_draw_keys(), "mask": np.asarray(MASKS["positions"])}
    masked = build_fused(
        "MultiHeadAttention", ["q", "k", "v", "", "mask"], data, {}, num_heads=HEADS
    )
    plain = build_fused("MultiHeadAttention", ["q", "k", "v"], _draw_keys(), {}, num_heads=HEADS)
    (ignored,), (expected,) = run_stock(masked, data), run_stock(plain, _draw_keys())
    np.testing.assert_allclose(ignored, expected, rtol=1e-5, atol=1e-6)
    told = r"it has a mask, .*without use_multi_head_attention.*or export.*without the optimizer"
    with pytest.raises(UnsupportedModel, match=told):
        write_out(masked)


def _draw_keys() -> dict[str, np.ndarray]:
    return {"q": draw(BATCH, 3, WIDTH), "k": X, "v": draw(BATCH, LENGTH, WIDTH, seed=1)}


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("places", [np.array([1]), np.array([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]])])
def test_rotary_embeddings(interleaved: int, split: bool, places: np.ndarray) -> None:
    x = draw(BATCH, HEADS, LENGTH, 4) if split else X
    angles = np.outer(np.arange(8), [1.0, 0.1]).astype(np.float32)
    weights = {"places": places, "cos": np.cos(angles), "sin": np.sin(angles)}
    model = build_fused(
        "RotaryEmbedding", ["x", "places", "cos", "sin"], {"x": x}, weights,
        interleaved=interleaved,
    )  # fmt: skip
    hold_fused(model, {"x": x})


@pytest.mark.parametrize(
    ("given", "outputs", "reason"),
    [
        ({"do_rotary": 1}, ["y"], "rotates its operands"),
        ({"num_heads": 3}, ["y"], "3 heads do not divide"),
        ({"num_heads": 0}, ["y"], "0 heads"),
        ({}, ["y", "present"], r"output 1 \('present'\)"),
    ],
)
def test_what_cannot_be_written_out_is_refused(
    given: dict[str, Any], outputs: list[str], reason: str
) -> None:
    weights = {"w": draw(WIDTH, 3 * WIDTH), "b": draw(3 * WIDTH)}
    model = build_fused(
        "Attention", ["x", "w", "b"], {"x": X}, weights, outputs, **{"num_heads": HEADS, **given}
    )
    with pytest.raises(UnsupportedModel, match=rf"'fused' \(Attention\).*{reason}"):
        write_out(model)


def test_packed_keys_are_refused() -> None:
    model = build_fused("MultiHeadAttention", ["x"], {"x": X}, {}, num_heads=HEADS)
    with pytest.raises(UnsupportedModel, match="packed into one input"):
        write_out(model)


def _attend(made: np.ndarray, mask: np.ndarray | None, causal: int) -> np.ndarray:
    size = WIDTH // HEADS
    q, k, v = (
        part.reshape(BATCH, LENGTH, HEADS, size).swapaxes(1, 2) for part in np.split(made, 3, -1)
    )
    scores = q @ k.swapaxes(2, 3) / np.sqrt(size)
    if mask is not None:
        if mask.ndim == 1:
            mask = np.arange(LENGTH) < mask[:, None]
        kept = mask.reshape(BATCH, 1, -1, LENGTH) > 0
        scores = scores + np.where(kept, 0.0, -10000.0)
    if causal:
        scores = np.where(np.tril(np.ones((LENGTH, LENGTH))) > 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.asarray((weights @ v).swapaxes(1, 2).reshape(BATCH, LENGTH, WIDTH))
