"""Weights of a few bits each, against ONNX Runtime's kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

import splitonnx
from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.normalization.fused.packed_weights import unpack_weights
from tests.support.fused_models import build_fused, draw, run_stock
from tests.support.packed_models import BLOCK as BLOCKS
from tests.support.packed_models import INNER, build_packed, draw_packed

K, N, BLOCK = 40, 6, 16


def build(zeros: str, **attributes: Any) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    random, blocks = np.random.default_rng(0), -(-K // BLOCK)
    data = {"x": draw(3, K)}
    weights: dict[str, np.ndarray] = {
        "packed": random.integers(0, 256, (N, blocks, BLOCK // 2)).astype(np.uint8),
        "scales": (0.1 * random.random(N * blocks)).astype(np.float32),
    }
    if zeros == "floats":
        weights["zeros"] = random.uniform(0, 16, N * blocks).astype(np.float32)
    if zeros == "bytes":
        weights["zeros"] = random.integers(0, 256, N * (-(-blocks // 2))).astype(np.uint8)
    given = {"K": K, "N": N, "bits": 4, "block_size": BLOCK, **attributes}
    return build_fused("MatMulNBits", ["x", *weights], data, weights, **given), data


def add_order(model: onnx.ModelProto, groups: list[int]) -> None:
    """Give the node the block of each row."""
    order = onnx.numpy_helper.from_array(np.array(groups, np.int32), "order")
    model.graph.initializer.append(order)
    (node,) = model.graph.node
    node.input.extend([*[""] * (4 - len(node.input)), "order"])


def draw_order(size: int = K) -> list[int]:
    return [int(group) for group in np.random.default_rng(3).integers(0, -(-K // BLOCK), size)]


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


@pytest.mark.parametrize("zeros", ["", "floats"])
@pytest.mark.parametrize("size", [K, 48])  # one for each row, and one for each place in a block
def test_rows_in_groups_of_their_own_order_compute_the_same(zeros: str, size: int) -> None:
    model, data = build(zeros)
    (straight,) = run_stock(model, data)
    add_order(model, draw_order(size))
    (expected,) = run_stock(model, data)
    assert np.abs(expected - straight).max() > 0.1
    written = ir.from_proto(model)
    unpack_weights(written.graph)
    assert list(written.graph.initializers) == ["packed#float"]
    found, *_ = ReferenceEvaluator(ir.to_proto(written)).run(None, data)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-5)


def test_zero_points_that_the_kernel_leaves_out_are_refused_unless_they_are_the_usual_ones() -> (
    None
):
    model, data = build("bytes")
    add_order(model, draw_order())
    with pytest.raises(UnsupportedModel, match="packed zero points, which ONNX Runtime"):
        unpack_weights(ir.from_proto(model).graph)
    zeros = next(tensor for tensor in model.graph.initializer if tensor.name == "zeros")
    zeros.raw_data = b"\x88" * len(zeros.raw_data)
    written = ir.from_proto(model)
    unpack_weights(written.graph)
    found, *_ = ReferenceEvaluator(ir.to_proto(written)).run(None, data)
    np.testing.assert_allclose(np.asarray(found), run_stock(model, data)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [draw_order(K - 1), [3] * K, [-1] * K])
def test_groups_that_do_not_fit_are_refused(groups: list[int]) -> None:
    model, _ = build("")
    add_order(model, groups)
    with pytest.raises(UnsupportedModel, match="does not name one of 3 groups for each row"):
        unpack_weights(ir.from_proto(model).graph)


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
    with pytest.raises(UnsupportedModel, match="not stored in the model") as caught:
        unpack_weights(ir.from_proto(model).graph)
    assert "MatMulNBitsQuantizer" in str(caught.value)  # no optimizer of ONNX Runtime wrote it
    assert "optimized model" not in str(caught.value)


def test_a_weight_in_groups_of_their_own_order_is_trained_and_compared() -> None:
    model = build_packed(level=0)
    groups = np.random.default_rng(4).integers(0, INNER // BLOCKS, INNER).astype(np.int32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(groups, "order"))
    model.graph.node[2].input.extend(["", "order"])
    bundle = splitonnx.cut(model, at="h", loss="mse", send_labels=True, check=True)
    assert bundle.server is not None
    assert "packed_weight#float" in bundle.server.weights
    found = onnx.load_from_string(splitonnx.merge(bundle))
    given, data = model.SerializeToString(), draw_packed()
    expected, merged = (
        onnxruntime.InferenceSession(content).run(None, data)[0]
        for content in (given, found.SerializeToString())
    )
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5)
