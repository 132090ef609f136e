"""Every pooling, MaxUnpool and LRN, over their attributes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.support.forked_cases import Run, forking
from tests.support.images import Case, hold, whole

POOLS: list[dict[str, Any]] = [
    {"kernel_shape": [2, 2]},
    {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]},
    {"kernel_shape": [2, 3], "strides": [2, 3], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "dilations": [2, 3], "strides": [1, 2], "pads": [1, 1, 0, 1]},
]


@pytest.fixture(scope="module")
def run_apart() -> Iterator[Run]:
    """Run a task of ``unsized_pools`` in a process of its own."""
    with forking("tests.partitioner.rewrites.unsized_pools") as run:
        yield run


@pytest.mark.parametrize("rank", ["1", "2", "3"])
@pytest.mark.parametrize("dynamic", ["1", "0 1", "1 2", "0 1 2"])
def test_max_pool_of_an_unknown_number_of_channels(run_apart: Run, rank: str, dynamic: str) -> None:
    """MaxPoolGrad takes them from the graph, and wrote beyond memory for none of them."""
    ended = run_apart("sizes", rank, *dynamic.split())
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("axis", ["0", "1"])
def test_max_pool_in_a_loop_over_unknown_sizes(run_apart: Run, axis: str) -> None:
    ended = run_apart("body", axis)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("rank", ["1", "2", "3"])
@pytest.mark.parametrize("dynamic", ["0", "0 1", "0 2"])
def test_windows_of_lowest_numbers_get_no_gradient(run_apart: Run, rank: str, dynamic: str) -> None:
    """The kernel's index of such a window is in the channel before, or before the whole tensor."""
    ended = run_apart("empty", rank, *dynamic.split())
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("attributes", POOLS)
@pytest.mark.parametrize("dynamic", [(0,), (0, 2, 3)])
def test_max_pool(attributes: dict[str, Any], dynamic: Sequence[int]) -> None:
    hold(Case(kind="MaxPool", x=(2, 2, 7, 8), attributes=attributes, dynamic=dynamic))


@pytest.mark.parametrize("attributes", POOLS)
def test_max_pool_of_lines(attributes: dict[str, Any]) -> None:
    rank = 2
    line = {
        name: [values[0]] if name != "pads" else [values[0], values[rank]]
        for name, values in attributes.items()
        if name != "ceil_mode"
    }
    hold(Case(kind="MaxPool", x=(2, 2, 9), attributes=line))


def test_max_pool_with_indices_down_the_columns() -> None:
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2], "storage_order": 1}
    hold(Case(kind="MaxPool", x=(2, 2, 6, 6), attributes=attributes, outputs=2))


def test_max_pool_of_volumes() -> None:
    attributes = {"kernel_shape": [2, 2, 2], "strides": [2, 1, 2], "pads": [1, 0, 0, 1, 0, 0]}
    hold(Case(kind="MaxPool", x=(2, 2, 4, 4, 5), attributes=attributes))


@pytest.mark.parametrize(
    ("attributes", "dynamic"),
    [
        (attributes, dynamic)
        for attributes in POOLS
        for dynamic in [(0,), (0, 2, 3)]
        # which windows ceil_mode adds depends on the image's size
        if len(dynamic) == 1 or "ceil_mode" not in attributes
    ],
)
@pytest.mark.parametrize("include", [0, 1])
def test_average_pool(attributes: dict[str, Any], include: int, dynamic: Sequence[int]) -> None:
    attributes = {**attributes, "count_include_pad": include}
    case = Case(kind="AveragePool", x=(2, 2, 7, 8), attributes=attributes, dynamic=dynamic)
    hold(case)


@pytest.mark.parametrize("attributes", POOLS)
@pytest.mark.parametrize("power", [1, 2, 3])
def test_lp_pool(attributes: dict[str, Any], power: int) -> None:
    attributes = {**attributes, "p": power}
    ragged = "ceil_mode" in attributes  # onnx.reference scales what ceil_mode adds
    case = Case(kind="LpPool", x=(2, 2, 7, 8), attributes=attributes)
    hold(case, oracle="kernel" if ragged else "both")


@pytest.mark.parametrize("kind", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("x", [(2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_global_pools(kind: str, x: tuple[int, ...], dynamic: bool) -> None:
    case = Case(kind=kind, x=x, dynamic=range(len(x)) if dynamic else [0])
    hold(case, oracle="both" if len(x) == 4 else "kernel")  # onnx.reference knows only images


@pytest.mark.parametrize("size", [1, 2, 5])
def test_local_response_normalization(size: int) -> None:
    attributes = {"size": size, "alpha": 0.5, "beta": 0.6, "bias": 1.5}
    case = Case(kind="LRN", x=(4, 4, 3, 2), attributes=attributes)
    # onnx.reference takes the number of images for that of channels; the kernel wants odd sizes
    hold(case, oracle="both" if size % 2 else "reference")


@pytest.mark.parametrize("shape", [None, (2, 2, 7, 7)])
@pytest.mark.parametrize("dynamic", [(0,), (0, 1, 2, 3)])
def test_max_unpool(shape: tuple[int, ...] | None, dynamic: Sequence[int]) -> None:
    corners = np.array([0, 4, 14, 22], np.int64).reshape(1, 1, 2, 2)
    places = corners + 36 * np.arange(4).reshape(2, 2, 1, 1)
    others = {"places": places} | ({"shape": whole(*shape)} if shape else {})
    attributes = {"kernel_shape": [3, 3], "strides": [3, 3]}
    case = Case(
        kind="MaxUnpool", x=(2, 2, 2, 2), others=others, attributes=attributes, dynamic=dynamic
    )
    hold(case, oracle="reference" if shape else "both")


@pytest.mark.parametrize("power", [1, 2, 3])
def test_global_lp_pool(power: int) -> None:
    case = Case(kind="GlobalLpPool", x=(2, 3, 4, 5), attributes={"p": power}, dynamic=(0, 2, 3))
    hold(case, oracle="kernel")  # onnx.reference has none
