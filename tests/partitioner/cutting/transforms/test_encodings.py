"""What codecs have in common: which shapes they refuse, and how they tell what is not finite."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.partitioner.cutting.transforms.encodings import (
    Piece,
    count_row,
    poison,
    refuse_rank,
    refuse_rows,
    restore_shape,
)
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.tensors import TensorSpec
from tests.support.encodings import run_nodes


def spec(*shape: int | str) -> TensorSpec:
    return TensorSpec(name="x", dtype="F32", shape=shape)


def test_channels_are_on_the_second_axis() -> None:
    assert not refuse_rank(spec("N", "C"))
    assert refuse_rank(spec("N")) == "it has 1 dimensions, and the second holds the channels"


def test_rows_have_a_known_number_of_elements() -> None:
    assert not refuse_rows(spec("N", 4, 4), 16)
    assert "a sample has 12 elements, and it needs 16" in refuse_rows(spec("N", 12), 16)
    assert "its size 'T' is not known beforehand" in refuse_rows(spec("N", "T", 3), 1)
    assert "it has 1 dimensions" in refuse_rows(spec("N"), 1)
    assert count_row(spec("N", 3, 5, 7)) == 105


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_only_a_row_that_is_not_finite_is_poisoned(odd: float) -> None:
    x = np.full((3, 4), np.finfo(np.float32).max)
    x[1, 2] = odd
    found = run_nodes(lambda builder, value: poison(builder, value, [1]), x)
    np.testing.assert_array_equal(found, [0, np.nan, 0])


def test_rows_get_the_shape_of_their_tensor_again() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 12)
    found = run_nodes(lambda builder, value: restore_shape(builder, value, spec("N", 3, 4)), x)
    np.testing.assert_array_equal(found, x.reshape(2, 3, 4))


def test_a_piece_of_floats_has_no_bounds() -> None:
    value = NodeBuilder("b").integer(0)
    assert Piece(suffix="scale", value=value, dtype="F32", shape=(3,)).bounds is None
