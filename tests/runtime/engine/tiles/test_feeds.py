"""Memory is not read by its address before it is known what is there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.tiles.feeds import check_feed, read_scalar

ENGINE = Engine(threads=1)


def hold(array: np.ndarray) -> dict[str, Any]:
    return {"x": ENGINE.from_array(array)._value}


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "'x' is missing"),
        (hold(np.ones((3, 2), np.float32)), r"\[3, 2\] instead of \[2, 3\]"),
        (hold(np.ones((2, 3, 1), np.float32)), r"\[2, 3, 1\] instead of \[2, 3\]"),
        (hold(np.ones((2, 3))), "double.* instead of"),
    ],
)
def test_a_tensor_that_is_not_as_declared_is_refused(feeds: dict[str, Any], message: str) -> None:
    check_feed("x", hold(np.ones((2, 3), np.float32)), (2, 3))
    with pytest.raises(ValueError, match=message):
        check_feed("x", feeds, (2, 3))


def test_a_number_has_no_dimensions_however_it_came() -> None:
    for shape in ((), (1,), (1, 1, 1)):
        found = read_scalar("x", hold(np.full(shape, 0.5, np.float32)))
        assert (found.shape, found.tolist()) == ((), 0.5)


@pytest.mark.parametrize("array", [np.ones(2, np.float32), np.array(1.0), np.ones(0, np.float32)])
def test_what_is_not_one_single_precision_number_is_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="instead of one element of the type float32"):
        read_scalar("x", hold(array))
    with pytest.raises(ValueError, match="'x' is missing"):
        read_scalar("x", {})
