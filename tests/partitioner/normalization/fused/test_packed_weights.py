"""Weights of a few bits each, against ONNX Runtime's kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.normalization.fused.packed_weights import unpack_weights
from tests.support.fused_models import build_fused, draw, run_stock

K, N, BLOCK = 40, 6, 16


def build(zeros: str, **attributes: Any) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    random, blocks = np.random.default_rng(0), -(-K // BLOCK)
    data = {"x": draw(3, K)}
    weights: dict[str, np.ndarray] = {
        "packed": random.integers(0, 256, (N, blocks, BLOCK // 2)).astype(np.uint8),
        "scales": (0.1 * random.random(N * blocks)).astype(np.float32),
    }
    if zeros == "bytes":
        weights["zeros"] = random.integers(0, 256, N * (-(-blocks // 2))).astype(np.uint8)
    given = {"K": K, "N": N, "bits": 4, "block_size": BLOCK, **attributes}
    return build_fused("MatMulNBits", ["x", *weights], data, weights, **given), data


@pytest.mark.parametrize("zeros", ["", "bytes"])
def test_they_become_floats_that_compute_the_same(zeros: str) -> None:
    model, data = build(zeros)
    (expected,) = run_stock(model, data)
    written = ir.from_proto(model)
    unpack_weights(written.graph)
    assert list(written.graph.initializers) == ["packed#float"]
    found, *_ = ReferenceEvaluator(ir.to_proto(written)).run(None, data)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-5)


def test_a_kernel_of_low_accuracy_rounds_each_activation_within_its_block() -> None:
    model, data = build("", accuracy_level=4)
    (rounded,) = run_stock(model, data)
    written = ir.from_proto(model)
    unpack_weights(written.graph)
    array = written.graph.initializers["packed#float"].const_value
    assert array is not None
    weight = array.numpy().astype(np.float64)
    gap = np.abs(rounded - data["x"] @ weight)
    blocks = [slice(start, start + BLOCK) for start in range(0, K, BLOCK)]
    bound = sum(
        np.outer(np.abs(data["x"][:, block]).max(1) / 254, np.abs(weight[block]).sum(0))
        for block in blocks
    )
    assert gap.max() > 1e-3
    assert (gap <= bound + 1e-5).all()


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"bits": 3}, "has 3 bits"), ({"K": 999}, "another size"), ({"block_size": 0}, "blocks of 0")],
)
def test_other_layouts_are_refused(given: dict[str, int], reason: str) -> None:
    model, _ = build("", **given)
    with pytest.raises(UnsupportedModel, match=rf"'fused' \(MatMulNBits\).*{reason}"):
        unpack_weights(ir.from_proto(model).graph)


def test_a_weight_that_is_not_stored_is_refused() -> None:
    model, _ = build("")
    del model.graph.initializer[0]
    model.graph.input.append(onnx.helper.make_tensor_value_info("packed", 2, [N, 3, 8]))
    with pytest.raises(UnsupportedModel, match="not stored in the model"):
        unpack_weights(ir.from_proto(model).graph)
