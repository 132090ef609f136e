"""The axis of an output that counts the samples is found by the names of its dimensions."""

from __future__ import annotations

from typing import Any

import pytest

from splitonnx.sample_axes import find_sample_axis
from splitonnx.tensors import TensorSpec
from tests.vectors.sample_axes import build_sample_axes


def _declare(shape: list[int | str | None]) -> TensorSpec:
    return TensorSpec(name="y", dtype="F32", shape=tuple(shape))


@pytest.mark.parametrize("case", build_sample_axes(), ids=str)
def test_the_axis_is_the_one_that_carries_the_name_of_the_samples(case: dict[str, Any]) -> None:
    data = [_declare(shape) for shape in case["data"]]
    found = find_sample_axis(
        _declare(case["output"]), data, has_own_batches=case["has_own_batches"]
    )
    assert found == case["axis"]
