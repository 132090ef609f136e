"""Inputs are drawn from what a model declares."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from splitonnx.partitioner.cutting.conformance.samples import (
    find_masks,
    find_open_batch,
    iter_draws,
    list_inputs,
    repeat_sample,
)

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def make_model(*inputs: onnx.ValueInfoProto) -> onnx.ModelProto:
    """Make a model of one node, with these inputs."""
    output = helper.make_tensor_value_info("y", FLOAT, None)
    node = helper.make_node("Identity", [inputs[0].name], ["y"])
    return helper.make_model(helper.make_graph([node], "model", list(inputs), [output]))


def test_a_symbolic_batch_is_drawn_with_several_sizes_and_one_alone_after_them() -> None:
    model = make_model(helper.make_tensor_value_info("x", FLOAT, ["N", 3]))
    sizes = [[len(batch["x"]) for batch in draw] for draw in iter_draws(model, 0)]
    assert sizes == [[2, 3, 5], [1, 1]]


def test_the_symbol_of_the_batch_has_one_size_on_every_axis() -> None:
    x = helper.make_tensor_value_info("x", FLOAT, ["N", "T", 3])
    state = helper.make_tensor_value_info("state", FLOAT, [2, "N", 5])
    model = make_model(x, state)
    for draw in iter_draws(model, 0):
        assert all(batch["x"].shape[0] == batch["state"].shape[1] for batch in draw)
    assert find_open_batch(model) == "N"
    single = {"x": np.ones((1, 7, 3)), "state": np.ones((2, 1, 5))}
    repeated = repeat_sample(model, single, "N")
    assert repeated is not None
    assert {name: array.shape for name, array in repeated.items()} == {
        "x": (2, 7, 3),
        "state": (2, 2, 5),
    }
    assert repeat_sample(model, repeated, "N") is None


def test_without_one_symbol_on_the_first_axes_no_batch_is_open() -> None:
    x, z = (helper.make_tensor_value_info(n, FLOAT, [n.upper(), 3]) for n in ("x", "z"))
    assert find_open_batch(make_model(x)) == "X"
    assert find_open_batch(make_model(x, z)) == ""
    assert find_open_batch(make_model(helper.make_tensor_value_info("x", FLOAT, [1, 3]))) == ""


def test_a_fixed_batch_is_kept() -> None:
    model = make_model(helper.make_tensor_value_info("x", FLOAT, [4, 3]))
    draws = list(iter_draws(model, 0))
    assert all([batch["x"].shape for batch in draw] == [(4, 3)] * 2 for draw in draws)


@pytest.mark.parametrize("rows", ["N", 5])
def test_the_last_batch_has_larger_floats_than_the_others(rows: str | int) -> None:
    model = make_model(helper.make_tensor_value_info("x", FLOAT, [rows, 1000]))
    *usual, last = (batch["x"].std() for batch in next(iter_draws(model, 0)))
    assert usual == pytest.approx([1.0] * len(usual), rel=0.1)
    assert last == pytest.approx(3.0, rel=0.1)


def test_several_lengths_are_tried_for_symbolic_sizes_behind_the_batch() -> None:
    model = make_model(helper.make_tensor_value_info("x", FLOAT, ["N", "T", 3]))
    lengths = [draw[0]["x"].shape[1] for draw in iter_draws(model, 0)]
    assert lengths[:3] == [8, 32, 4]


def test_integers_are_drawn_below_smaller_and_smaller_limits() -> None:
    model = make_model(helper.make_tensor_value_info("x", INT64, ["N", 100]))
    assert [draw[0]["x"].max() for draw in iter_draws(model, 0)][:6] == [7, 5, 3, 2, 1, 0]


def test_the_same_seed_draws_the_same() -> None:
    model = make_model(helper.make_tensor_value_info("x", FLOAT, ["N", 3]))
    first, again, other = (next(iter_draws(model, seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0]["x"], again[0]["x"])
    assert not np.array_equal(first[0]["x"], other[0]["x"])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(TensorProto.BOOL, np.bool_), (TensorProto.DOUBLE, np.float64), (TensorProto.UINT8, np.uint8)],
)
def test_every_type_of_numbers_is_drawn(dtype: int, expected: type) -> None:
    model = make_model(helper.make_tensor_value_info("x", dtype, ["N"]))
    assert next(iter_draws(model, 0))[0]["x"].dtype == expected


def test_nothing_is_drawn_for_strings_or_sequences() -> None:
    text = helper.make_tensor_value_info("x", TensorProto.STRING, ["N"])
    sequence = helper.make_tensor_sequence_value_info("x", FLOAT, ["N"])
    assert not list(iter_draws(make_model(text), 0))
    assert not list(iter_draws(make_model(sequence), 0))


def test_an_input_with_an_initializer_is_not_drawn() -> None:
    model = make_model(
        helper.make_tensor_value_info("x", FLOAT, ["N"]),
        helper.make_tensor_value_info("w", FLOAT, [2]),
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "w"))
    assert [value.name for value in list_inputs(model)] == ["x"]


@pytest.mark.parametrize("size", ["N", 4])
def test_a_quantized_model_gets_a_batch_near_the_end_of_its_range(size: str | int) -> None:
    model = make_model(helper.make_tensor_value_info("x", FLOAT, [size, 50]))
    for name, value in (("scale", np.array(0.1, np.float32)), ("zero", np.array(0, np.uint8))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    model.graph.node[0].op_type = "QuantizeLinear"
    model.graph.node[0].input.extend(["scale", "zero"])
    *_, usual, near = next(iter_draws(model, 0))
    assert np.abs(usual["x"]).max() < 6
    assert near["x"].dtype == np.float32
    assert 0.8 < np.mean((near["x"] > 0.9 * 25.5) & (near["x"] <= 25.5)) < 1


def test_lengths_of_sequences_are_drawn_from_1_on() -> None:
    x = helper.make_tensor_value_info("x", FLOAT, ["N", "T", 2])
    lens = helper.make_tensor_value_info("lens", INT64, ["N"])
    model = make_model(x, lens)
    cast = helper.make_node("Cast", ["lens"], ["cast"], to=TensorProto.INT32)
    layer = helper.make_node("GRU", ["x", "w", "r", "", "cast"], ["z"])
    model.graph.node.extend([cast, layer])
    for draw in iter_draws(model, 0):
        assert all((batch["lens"] >= 1).all() for batch in draw)


def build_sum(kind: int, *, recast: int = TensorProto.INT32) -> onnx.ModelProto:
    """Make a GRU whose lengths are the sums of a mask."""
    x = helper.make_tensor_value_info("x", FLOAT, ["N", 6, 2])
    model = make_model(x, helper.make_tensor_value_info("mask", kind, ["N", 6]))
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["mask"], ["numbers"], to=FLOAT),
            helper.make_node("ReduceSum", ["numbers", "axes"], ["sum"], keepdims=0),
            helper.make_node("Cast", ["sum"], ["lens"], to=recast),
            helper.make_node("GRU", ["x", "w", "r", "", "lens"], ["z"]),
        ]
    )
    return model


@pytest.mark.parametrize("kind", [FLOAT, INT64, TensorProto.BOOL])
def test_what_lengths_are_counted_from_is_also_drawn_as_a_mask(kind: int) -> None:
    model = build_sum(kind)
    assert find_masks(model) == {"mask"}
    usual, masked = list(iter_draws(model, 0))[:2]
    for plain, batch in zip(usual, masked, strict=True):
        counts = batch["mask"].astype(int).sum(axis=1)
        assert set(np.unique(batch["mask"].astype(float))) <= {0.0, 1.0}
        assert (counts >= 1).all()
        assert (counts <= 6).all()
        assert batch["mask"].dtype == plain["mask"].dtype
        assert len(batch["mask"]) == len(plain["mask"])
    assert len({int(n) for batch in masked for n in batch["mask"].astype(int).sum(axis=1)}) > 1


def test_a_mask_of_time_before_batch_has_a_length_for_each_sample() -> None:
    model = build_sum(FLOAT)
    del model.graph.input[1].type.tensor_type.shape.dim[:]
    model.graph.input[1].type.tensor_type.shape.dim.add().dim_value = 6
    model.graph.input[1].type.tensor_type.shape.dim.add().dim_param = "N"
    _, masked = list(iter_draws(model, 0))[:2]
    assert all((batch["mask"].sum(axis=0) >= 1).all() for batch in masked)


def test_a_float_that_may_be_a_length_itself_is_drawn_as_1() -> None:
    model = make_model(helper.make_tensor_value_info("lens", FLOAT, ["N"]))
    cast = helper.make_node("Cast", ["lens"], ["cast"], to=TensorProto.INT32)
    model.graph.node.extend([cast, helper.make_node("ReverseSequence", ["x", "cast"], ["z"])])
    _, masked = list(iter_draws(model, 0))[:2]
    assert all((batch["lens"] == 1).all() for batch in masked)


def test_a_mask_within_a_branch_is_found() -> None:
    model = build_sum(FLOAT)
    inner = helper.make_graph(
        list(model.graph.node)[1:], "then", [], [helper.make_tensor_value_info("z", FLOAT, None)]
    )
    del model.graph.node[1:]
    model.graph.node.append(
        helper.make_node("If", ["on"], ["result"], then_branch=inner, else_branch=inner)
    )
    assert find_masks(model) == {"mask"}


def test_floats_whose_sizes_alone_are_used_are_no_masks() -> None:
    model = make_model(helper.make_tensor_value_info("x", FLOAT, ["N", 3]))
    model.graph.node.extend(
        [
            helper.make_node("Shape", ["x"], ["sizes"]),
            helper.make_node("Reshape", ["x", "sizes"], ["z"]),
        ]
    )
    assert find_masks(model) == set()
    ids = make_model(helper.make_tensor_value_info("ids", INT64, ["N", 3]))
    ids.graph.node.append(helper.make_node("Gather", ["table", "ids"], ["z"]))
    assert find_masks(ids) == set()
