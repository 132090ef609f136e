"""The axis of an output that holds the classes, and the shape of labels beside it."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.partitioner.differentiation.class_axes import (
    choose_class_axis,
    count_classes,
    list_label_dims,
)


def make_scores(*dims: int | str) -> ir.Value:
    return ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(list(dims)))


def test_classes_are_on_axis_1_or_on_the_only_known_one() -> None:
    assert choose_class_axis(make_scores("N", 5), None) == 1
    assert choose_class_axis(make_scores("N", "T", 5), None) == 2
    assert choose_class_axis(make_scores("N", 5, "T"), -2) == 1
    assert count_classes(make_scores("N", "T", 5), 2) == 5
    assert list_label_dims(make_scores("N", "T", 5), 2) == ("N", "T")


def test_an_axis_that_may_be_two_or_none_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="may have their classes on axis 1 or on the last"):
        choose_class_axis(make_scores("N", 4, 4), None)
    with pytest.raises(UnsupportedModel, match="with C known"):
        choose_class_axis(make_scores("N", "C"), None)
    for axis in (0, 2, -2):
        with pytest.raises(UsageError, match=f"--class-axis {axis} is not an axis"):
            choose_class_axis(make_scores("N", 4), axis)
