"""Sizes that a model's file fixes are found where the user or the preparation changed them."""

from __future__ import annotations

import onnx
import pytest

from splitonnx.partitioner.cutting.conformance.freed_batches import FreedBatch, list_freed
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.adjustments import Adjustments
from splitonnx.partitioner.gate.gates import open_model
from tests.support.nets import FLOAT, Net
from tests.support.small_models import load_model


def build(x: list[int | str], z: list[int | str]) -> onnx.ModelProto:
    """Build y = x w + z v, of inputs of rank 2."""
    net = Net()
    left = net.op("MatMul", "x", net.weight("w", 4, 3), out="a")
    right = net.op("MatMul", "z", net.weight("v", 4, 3), out="b")
    return net.finish({"x": (FLOAT, x), "z": (FLOAT, z)}, net.op("Add", left, right, out="y"), 3)


def find(model: onnx.ModelProto, **dims: int | str) -> list[FreedBatch]:
    adjustments = Adjustments(dims={name.replace("_", ":"): size for name, size in dims.items()})
    return list_freed(model, prepare(open_model(model, adjustments), adjustments=adjustments))


def test_sizes_of_one_name_are_one_batch() -> None:
    (found,) = find(build([1, 4], [1, 4]), x_0="N", z_0="N")
    assert found.places == (("x", 0), ("z", 0))
    assert (found.rows, found.counts) == (1, (2, 3))
    assert found.options == "--dim x:0=N --dim z:0=N"
    assert found.axes == {"x": 0, "z": 0}


def test_sizes_of_two_names_are_two_batches() -> None:
    found = find(build([1, 4], [1, 4]), x_0="N", z_0="M")
    assert [batch.places for batch in found] == [(("x", 0),), (("z", 0),)]


def test_an_input_that_has_the_same_size_already_is_part_of_the_batch() -> None:
    (found,) = find(build([2, 4], ["N", 4]), x_0="N")
    assert found.sizes == {("x", 0): 2, ("z", 0): 2}
    fixed = found.fix(build([2, 4], ["N", 4]))
    assert [value.type.tensor_type.shape.dim[0].dim_value for value in fixed.graph.input] == [2, 2]


@pytest.mark.parametrize(("size", "counts"), [(6, (3,)), (5, ()), (1, ())])
def test_another_fixed_size_is_compared_if_it_is_a_multiple(
    size: int, counts: tuple[int, ...]
) -> None:
    (found,) = find(build([2, 4], [1, 4]), x_0=size)
    assert (found.rows, found.options) == (2, f"--dim x:0={size}")
    assert found.counts == counts


def test_a_size_that_is_no_batch_is_listed_without_counts() -> None:
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, 3), out="y")
    (found,) = find(net.finish({"x": (FLOAT, ["N", 5, 4])}, value, "T", 3), x_1="T")
    assert (found.places, found.counts, found.is_batch) == ((("x", 1),), (), False)


@pytest.mark.parametrize("dims", [{}, {"N": 4}, {"N": "B"}, {"x_0": 4}])
def test_a_symbolic_size_is_never_a_fixed_one(dims: dict[str, int | str]) -> None:
    assert not find(build(["N", 4], ["N", 4]), **dims)


def test_a_batch_that_preparation_frees_is_found_without_options() -> None:
    (found,) = find(load_model("12_batch_baked"))
    assert (found.places, found.rows, found.options) == ((("x", 0),), 1, "")
