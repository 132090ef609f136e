"""Large tensors are taken out of models and batches, and come back as they were."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.native.requests import keeping_contents
from splitonnx.partitioner.native.stored_tensors import (
    Stored,
    decode_stored,
    fill_weights,
    separate_weights,
    store_arrays,
)

LARGE = np.random.default_rng(0).standard_normal((200, 100)).astype(np.float32)


def receive(tensor: Stored) -> Stored:
    """Return a stored tensor as the other process has it."""
    kind, dims, kept = tensor
    return kind, dims, kept.content


def build(*weights: TensorProto) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="only")], "named",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        list(weights), doc_string="of the graph",
    )  # fmt: skip
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("own", 2)],
        ir_version=9, producer_name="test",
    )  # fmt: skip
    model.metadata_props.add(key="key", value="value")
    model.functions.add(name="f", domain="own")
    return model


def test_a_model_is_the_same_after_its_weights_were_taken_out() -> None:
    text = numpy_helper.from_array(np.array(["t" * (1 << 17)], object), "text")
    numbers = helper.make_tensor("numbers", TensorProto.FLOAT, [20000], range(20000))
    model = build(numpy_helper.from_array(np.arange(3), "small"), text, numbers)
    model.graph.initializer.append(numpy_helper.from_array(LARGE, "large"))  # the order stays
    before = model.SerializeToString()
    light = separate_weights(model)
    assert model.SerializeToString() == before
    assert list(light.weights) == ["large"]
    assert LARGE.tobytes() not in light.content
    received = {name: receive(tensor) for name, tensor in light.weights.items()}
    assert fill_weights(light.content, received) == model
    assert light.join() == before
    assert 0 <= len(before) - light.size < 50


@pytest.mark.parametrize(
    "dtype", ["?", "int8", "uint8", "int16", "uint32", "int64", "float16", "float32", "float64"]
)
def test_a_large_array_comes_back_as_it_was(dtype: str) -> None:
    array = (LARGE[:, ::2] * 50).astype(dtype)  # 10,000 of them
    array = np.tile(array, (8, 1)).T  # not in the order of its memory
    (stored,) = store_arrays([array]).values()
    made = decode_stored(receive(stored))
    assert made.dtype == array.dtype
    np.testing.assert_array_equal(made, array)


def test_an_array_is_stored_once_and_small_or_unusual_ones_are_not() -> None:
    texts = np.array(["t"] * 100_000, object)
    stored = store_arrays([LARGE, LARGE, LARGE[:2], texts, "text", LARGE.astype(complex)])
    assert list(stored) == [id(LARGE)]


def test_equal_weights_of_two_models_and_of_a_batch_are_one_within_a_block() -> None:
    first, second = (build(numpy_helper.from_array(LARGE.copy(), name)) for name in "ab")
    with keeping_contents():
        tensors = [
            *separate_weights(first).weights.values(),
            *separate_weights(second).weights.values(),
        ]
        tensors += store_arrays([LARGE.copy()]).values()
        assert len({id(kept) for _, _, kept in tensors}) == 1
