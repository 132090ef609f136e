"""The axis of an output that counts the samples is found by the names of its dimensions."""

from __future__ import annotations

import pytest

from splitonnx.sample_axes import find_sample_axis
from splitonnx.tensors import TensorSpec
from tests.vectors.sample_axes import AxisCase, build_sample_axes


def _declare(shape: list[int | str | None]) -> TensorSpec:
    return TensorSpec(name="y", dtype="F32", shape=tuple(shape))


@pytest.mark.parametrize("case", build_sample_axes(), ids=str)
def test_the_axis_is_the_one_that_carries_the_name_of_the_samples(case: AxisCase) -> None:
    shapes, output, own, axis = case
    data = [_declare(shape) for shape in shapes]
    assert find_sample_axis(_declare(output), data, has_own_batches=own) == axis
