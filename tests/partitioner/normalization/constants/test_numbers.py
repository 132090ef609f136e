"""Which numbers are usual in each role of a constant, and which look learned."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.partitioner.normalization.constants.numbers import (
    Place,
    are_written,
    is_uniform,
    is_usual,
)

INF = np.inf
DRAWN = np.random.default_rng(3)
HIDDEN = np.triu(np.full((5, 5), -INF), 1)
DISTANCE = np.arange(5) - np.arange(5)[:, None]
SLOPES = np.array([0.7071, 0.5, 0.3536])[:, None, None]
ROWS, COLUMNS = np.meshgrid(np.linspace(-1, 1, 3), np.linspace(-1, 1, 4), indexing="ij")
GRID = np.stack([COLUMNS * 0.9 + ROWS * 0.1 + 0.05, ROWS], -1)[None]


def draw(*shape: int) -> np.ndarray:
    return DRAWN.standard_normal(shape)


USUAL = {
    "a square": (Place.EXPONENT, 2.0),
    "a root": (Place.EXPONENT, -0.5),
    "a cube root": (Place.EXPONENT, 1 / 3),
    "the gamma of a screen": (Place.EXPONENT, 1 / 2.4),
    "powers": (Place.EXPONENT, np.arange(4)),
    "zeros": (Place.STATE, np.zeros((1, 1, 4))),
    "one place of a memory": (Place.STATE, np.eye(1, 4)),
    "nothing hidden": (Place.MASK, np.zeros((5, 5))),
    "hidden by infinity": (Place.MASK, HIDDEN),
    "hidden by the smallest float": (Place.MASK, np.where(HIDDEN < 0, -3.4028235e38, 0)),
    "hidden by ten thousand": (Place.MASK, np.where(HIDDEN < 0, -10000, 0)),
    "windows hidden by a hundred": (Place.MASK, np.where(HIDDEN < 0, -100, 0)),
    "a mask of zeros and ones": (Place.MASK, (HIDDEN == 0) * 1.0),
    "slopes by distance": (Place.MASK, -SLOPES * np.abs(DISTANCE)),
    "slopes behind a mask": (Place.MASK, SLOPES * DISTANCE + HIDDEN),
    "a regular grid": (Place.GRID, GRID),
    "one hot": (Place.VALUES, [0, 1]),
    "smoothed labels": (Place.VALUES, [0.1 / 9, 0.9]),
    "relu6": (Place.BOUND, 6.0),
    "no infinity": (Place.BOUND, -3.4e38),
    "no zero": (Place.BOUND, 1e-7),
    "almost one": (Place.BOUND, 0.95),
    "a step": (Place.RANGE, 0.25),
    "nothing": (Place.STATE, np.zeros((1, 0, 4))),
}
LEARNED = {
    "one exponent": (Place.EXPONENT, [2.9317]),
    "an exponent for each channel": (Place.EXPONENT, [[[3.0]], [[3.1667]]]),
    "a state": (Place.STATE, draw(1, 1, 4)),
    "a bias": (Place.MASK, draw(1, 2, 5, 5)),
    "a bias behind a mask": (Place.MASK, draw(1, 2, 5, 5) + HIDDEN),
    "a bias for each head": (Place.MASK, draw(1, 2, 1, 1)),
    "a flow": (Place.GRID, draw(1, 3, 4, 2)),
    "a small flow": (Place.GRID, draw(1, 2, 2, 2)),
    "a bent grid": (Place.GRID, GRID + 0.1 * ROWS[None, ..., None] ** 2),
    "values": (Place.VALUES, [0.3217, 1.8114]),
    "a bound": (Place.BOUND, 1.3),
    "a start": (Place.RANGE, 0.3713),
}


@pytest.mark.parametrize(("place", "numbers"), USUAL.values(), ids=USUAL)
def test_numbers_that_are_fixed_in_most_networks_are_usual(place: Place, numbers: object) -> None:
    assert is_usual(place, np.array(numbers, np.float32))


@pytest.mark.parametrize(("place", "numbers"), LEARNED.values(), ids=LEARNED)
def test_numbers_that_no_one_would_write_are_not(place: Place, numbers: object) -> None:
    assert not is_usual(place, np.array(numbers, np.float32))


def test_cosines_and_sines_of_the_same_angles_are_a_rotation() -> None:
    angles = np.arange(6)[:, None] * 0.1 ** np.arange(4)
    pair = [(1.2 * function(angles)).astype(np.float32) for function in (np.cos, np.sin)]
    assert is_usual(Place.ROTATION, pair[0], pair[1])
    assert is_usual(Place.ROTATION, pair[1], pair[0])
    assert not is_usual(Place.ROTATION, pair[0], draw(6, 4))
    assert not is_usual(Place.ROTATION, pair[0], pair[1][:5])
    assert not is_usual(Place.ROTATION, pair[0])


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_fractions_are_recognised_in_each_precision(kind: type[np.floating]) -> None:
    assert are_written(np.array([0.1, 1 / 3, -0.75, 1 / 90, 2.2, 0, np.inf]).astype(kind))
    assert not are_written(np.array([np.pi]).astype(kind))


def test_equal_numbers_are_uniform() -> None:
    assert is_uniform(np.full((3, 1, 1), 3.0))
    assert not is_uniform(np.array([3.0, 3.1]))
