"""Differences are measured relative to the largest value expected."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest

from splitonnx.partitioner.cutting.conformance.measures import (
    find_choices,
    find_largest,
    has_finite,
    is_finite,
    list_differences,
    measure,
)


def test_a_difference_is_relative_to_the_largest_value() -> None:
    assert measure(np.array([10.0, 1.5]), np.array([10.0, 1.0])) == pytest.approx(0.05)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_same_values_that_are_not_finite_are_equal(value: float) -> None:
    assert measure(np.array([value, 1.0]), np.array([value, 1.0])) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_only_one_side_has_not_finite_differs_without_limit(value: float) -> None:
    assert measure(np.array([value, 1.0]), np.array([1.0, 1.0])) == np.inf
    assert measure(np.array([1.0, 1.0]), np.array([value, 1.0])) == np.inf


def test_another_shape_differs_without_limit() -> None:
    assert measure(np.zeros((2, 1)), np.zeros(2)) == np.inf


def test_integers_booleans_and_strings_are_measured() -> None:
    assert measure(np.array([1, 4]), np.array([1, 4])) == 0
    assert measure(np.array([1, 3]), np.array([1, 4])) == 0.25
    assert measure(np.array([True]), np.array([False])) > 1
    assert measure(np.array(["a"], object), np.array(["b"], object)) == np.inf
    assert measure(np.array(["a"], object), np.array(["a"], object)) == 0


def test_empty_arrays_are_equal() -> None:
    assert measure(np.zeros((0, 3)), np.zeros((0, 3))) == 0


def test_the_largest_difference_names_its_tensor_and_batch() -> None:
    expected = [{"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2)}]
    found = [{"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2), "b": np.full(2, 3.0)}]
    largest = find_largest(list_differences(expected, found))
    assert (largest.tensor, largest.batch, largest.size) == ("b", 1, 2.0)


def test_a_tensor_that_only_one_side_has_is_left_out() -> None:
    assert find_largest(list_differences([{"a": np.ones(2)}], [{"b": np.ones(2)}])).size == 0


def test_what_is_finite_is_told_of_whole_arrays_and_of_some_element() -> None:
    mixed, void = np.array([1, np.inf]), np.array([np.nan, -np.inf], np.float16)
    assert is_finite(np.ones(2))
    assert is_finite(np.array(["a"], object))
    assert not is_finite(mixed)
    assert has_finite([void, mixed])
    assert has_finite([np.zeros(0)])
    assert not has_finite([void, void])


@pytest.mark.parametrize(
    ("nodes", "chooser"),
    [
        ("h, places = MaxPool <kernel_shape = [2]> (x) y = Cast <to = 1> (places)", "MaxPool"),
        ("y, places = MaxPool <kernel_shape = [2]> (x)", "MaxPool"),
        ("y = MaxPool <kernel_shape = [2]> (x)", None),
        ("y = Round (x)", "Round"),
        ("z = Round (x) y = Relu (x)", None),
        ("i = ArgMax (x) j = Relu (i) y = Floor (j)", "ArgMax"),
        ("i = Cast <to = 7> (x) y = Cast <to = 1> (i)", "Cast"),
        ("y = Cast <to = 10> (x)", None),
        ("y = Resize (x, , s)", "Resize"),
        ('y = Resize <mode = "linear"> (x, , s)', None),
        ("y = GridSample (x, s)", None),
        ('y = GridSample <mode = "nearest"> (x, s)', "GridSample"),
        (
            "y = If (c) <then_branch = t () => (u) { i = Sign (x) u = Relu (i) },"
            " else_branch = e () => (v) { v = Relu (x) }>",
            "Sign",
        ),
    ],
)
def test_an_output_behind_a_choice_is_mapped_to_the_first_node_that_makes_one(
    nodes: str, chooser: str | None
) -> None:
    text = f"model (float[N,1,4] x, float[3] s, bool c) => (float[N,1,3] y) {{ {nodes} }}"
    head = '<ir_version: 9, opset_import: ["" : 18]>'
    found = find_choices(onnx.parser.parse_model(head + text))
    assert {name: node.op_type for name, node in found.items()} == (
        {"y": chooser} if chooser else {}
    )
