"""Tensors whose numbers were computed: tables and kernels made here by numpy, and learned ones."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from splitonnx.partitioner.reports.formulas import (
    describe_formula,
    find_rotations,
    has_whole_numbers,
    is_fixed_filter,
)

Array = np.ndarray
ANGLES = np.arange(40)[:, None] * 10000.0 ** (-np.arange(0, 16, 2) / 16)


def interleave(one: Array, other: Array) -> Array:
    return np.stack([one, other], -1).reshape(len(one), -1)


def make_grid_table() -> Array:
    """Sines and cosines of the row, then of the column, as vision transformers add them."""
    places = np.stack(np.meshgrid(np.arange(6), np.arange(6))).reshape(2, -1)
    rates = 10000.0 ** (-np.arange(4) / 4)
    waves = [wave(place[:, None] * rates) for place in places for wave in (np.sin, np.cos)]
    return np.concatenate(waves, 1)


def make_cosines(size: int) -> Array:
    """The two-dimensional discrete cosine transform as a convolution's kernel."""
    steps = np.arange(size)
    one = np.cos(np.pi / size * (steps + 0.5) * steps[:, None])
    both: Array = np.einsum("au,bv->abuv", one, one).reshape(size * size, 1, size, size)
    return both


def make_fourier(window: Array, *, halves: bool = True) -> Array:
    size = len(window)
    turns = 2 * np.pi * np.arange(size // 2 + 1)[:, None] * np.arange(size) / size
    real, imaginary = np.cos(turns) * window, np.sin(turns) * window
    return (np.concatenate([real, imaginary]) if halves else real)[:, None]


def make_mel() -> Array:
    points = np.geomspace(2, 59, 12)
    bins = np.arange(20)
    return np.array(
        [
            np.clip(np.minimum((bins - low) / (mid - low), (high - bins) / (high - mid)), 0, None)
            for low, mid, high in zip(points, points[1:], points[2:], strict=False)
        ]
    )


def make_slopes(heads: int) -> Array:
    """The slopes of ALiBi, as its authors compute them for any number of heads."""
    power = 2 ** int(np.log2(heads))
    first = 2.0 ** (-8 / power * np.arange(1, power + 1))
    more = 2.0 ** (-4 / power * np.arange(1, 2 * power, 2))
    return np.concatenate([first, more[: heads - power]])


HANN = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(64) / 64)
LINE = np.linspace(-1, 1, 7)
COMPUTED: dict[str, tuple[Array, str]] = {
    "interleaved": (interleave(np.sin(ANGLES), np.cos(ANGLES)), "sines"),
    "concatenated": (np.concatenate([np.sin(ANGLES), np.cos(ANGLES)], 1)[None], "sines"),
    "time first": (np.concatenate([np.sin(ANGLES), np.cos(ANGLES)], 1)[:, None], "sines"),
    "transposed": (0.02 * interleave(np.sin(ANGLES), np.cos(ANGLES)).T, "sines"),
    "rotary": (np.cos(np.concatenate([ANGLES, ANGLES], 1))[None, None], "sines"),
    "image grid": (make_grid_table(), "same angles"),
    "behind a class token": (
        np.concatenate([np.zeros((1, 16)), make_grid_table()])[None],
        "same angles",
    ),
    "cosine transform": (make_cosines(8), "sines"),
    "small cosine transform": (make_cosines(4), "sines"),
    "Fourier": (make_fourier(np.ones(64)), "sines"),
    "windowed Fourier": (make_fourier(HANN), "Fourier"),
    "its real part": (make_fourier(HANN**2, halves=False), "sines"),
    "Hann": (HANN, "window"),
    "mel": (make_mel(), "triangular"),
    "mel, transposed": (make_mel().T[None], "triangular"),
    "frequencies": (10000.0 ** (-np.arange(8) / 8), "geometric"),
    "slopes": (2.0 ** -np.arange(1, 9)[:, None, None], "geometric"),
    "slopes of 12 heads": (make_slopes(12)[:, None, None], "two joined geometric"),
    "slopes of 6 heads": (make_slopes(6), "two joined geometric"),
    "slopes of 12 heads times 3": (3 * make_slopes(12), "two joined geometric"),
    "coordinates": (np.stack(np.meshgrid(LINE, LINE))[None], "evenly spaced"),
    "line": (LINE, "evenly spaced"),
    "line of 4": (np.linspace(0.5, 2, 4), "evenly spaced"),
    "line of 5": (np.linspace(0.3, 1.7, 5), "evenly spaced"),
    "grid of 4": (np.stack(np.meshgrid(LINE[::2], LINE[::2]))[None], "evenly spaced"),
    "grid of 4, uneven": (
        np.stack(np.meshgrid(np.linspace(-0.9, 0.9, 4), np.linspace(-0.83, 0.83, 4)), -1)[None],
        "evenly spaced",
    ),
    "4 frequencies": (10000.0 ** (-np.arange(4) / 4), "geometric"),
    "slopes of 4 heads": (make_slopes(4)[:, None, None], "geometric"),
}
WIDE = np.arange(70)[:, None] * 10000.0 ** (-np.arange(0, 1000, 2) / 1000)
LARGE = {
    "concatenated": (np.concatenate([np.sin(WIDE), np.cos(WIDE)], 1), "sines"),
    "interleaved": (interleave(np.sin(WIDE), np.cos(WIDE))[None], "sines"),
}
"""Tables of which only a part is read."""
TYPES = {"F32": np.float32, "F64": np.float64, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16"])
@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_tensor_is_recognised_by_its_numbers(name: str, dtype: str) -> None:
    array, words = COMPUTED[name]
    said = describe_formula(ir.tensor(array.astype(TYPES[dtype])))
    assert said is not None
    assert words in said


@pytest.mark.parametrize("name", LARGE)
def test_a_part_of_a_large_table_is_enough(name: str) -> None:
    array, words = LARGE[name]
    assert array.size > 1 << 16
    said = describe_formula(ir.tensor(array.astype(np.float32)))
    assert said is not None
    assert words in said


def test_a_table_of_bfloat16_is_recognised() -> None:
    array, _ = COMPUTED["concatenated"]
    assert describe_formula(ir.tensor(array.astype(ml_dtypes.bfloat16))) is not None


SHAPES = [
    (4,),
    (5,),
    (4, 2),
    (4, 4),
    (8,),
    (6,),
    (5, 2),
    (3, 3, 3, 3),
    (6, 1, 8),
    (2, 6),
    (16,),
    (12, 16),
    (40, 36),
]
DRAWS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "normal": lambda random, shape: random.standard_normal(shape),
    "uniform": lambda random, shape: random.random(shape),
    "rectified": lambda random, shape: np.maximum(random.standard_normal(shape), 0),
    "two values": lambda random, shape: np.sign(random.standard_normal(shape)),
    "few values": lambda random, shape: random.integers(-1, 2, shape).astype(float),
    "smooth": lambda random, shape: np.cumsum(np.cumsum(random.standard_normal(shape), 0), 0),
    "sparse": lambda random, shape: random.standard_normal(shape) * (random.random(shape) < 0.1),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_no_drawn_tensor_passes_for_computed(kind: str) -> None:
    for seed in range(20):
        for shape in SHAPES:
            drawn = DRAWS[kind](np.random.default_rng(seed), shape).astype(np.float32)
            assert describe_formula(ir.tensor(drawn)) is None, (seed, shape)


def test_first_values_and_matrices_of_algebra_are_not_computed() -> None:
    random = np.random.default_rng(1)
    orthogonal = np.linalg.qr(random.standard_normal((16, 16)))[0]
    for array in (
        np.zeros(8),
        np.ones((4, 4)),
        np.array([0.1, 0.1, 0.1, 0.1, 0.2]),
        np.eye(16),
        orthogonal,
        np.array(3.0),
    ):
        assert describe_formula(ir.tensor(array.astype(np.float32))) is None


def find_turned(**arrays: Array) -> set[str]:
    return find_rotations({name: ir.tensor(a.astype(np.float32)) for name, a in arrays.items()})


@pytest.mark.parametrize("length", range(2, 8))
def test_two_short_tables_of_the_same_angles_are_found_among_others(length: int) -> None:
    angles, random = ANGLES[:length], np.random.default_rng(length)
    drawn = random.uniform(-1, 1, angles.shape)
    others = {"drawn": drawn, "cosines of others": np.cos(drawn), "column": np.sin(ANGLES[:9, :1])}
    found = find_turned(a=np.cos(angles), b=np.sin(angles), **others)
    assert found == {"a", "b"}


def test_scales_and_shifts_of_normalizations_and_rotated_halves_are_no_rotations() -> None:
    assert find_turned(scale=np.ones(8), shift=np.zeros(8)) == set()
    eye = np.eye(4)
    assert find_turned(one=eye, other=1 - eye) == set()
    half = np.full((4, 4), np.sqrt(0.5))
    assert find_turned(one=half, other=-half) == set()


BLUR = np.outer([1, 2, 1], [1, 2, 1]) / 16
SOBEL = np.outer([1, 2, 1], [1, 0, -1])
HAAR = np.array([[1, 1], [1, -1]]) / np.sqrt(2)


@pytest.mark.parametrize("kernel", [BLUR, SOBEL, HAAR, np.full((3, 3), 1 / 9)])
def test_small_whole_numbers_but_for_a_factor_are_a_fixed_filter(kernel: Array) -> None:
    assert is_fixed_filter(ir.tensor(np.tile(kernel, (3, 1, 1, 1)).astype(np.float32)))


def test_drawn_kernels_and_kernels_of_one_number_are_no_fixed_filters() -> None:
    random = np.random.default_rng(2)
    for array in (random.standard_normal((4, 3, 3, 3)), np.ones((4, 3, 1, 1)), np.zeros((2, 1, 3))):
        assert not is_fixed_filter(ir.tensor(array.astype(np.float32)))


def test_a_matrix_of_whole_numbers_is_a_table_of_codes() -> None:
    codes = np.array([[0, 1, 1], [1, 0, 2]], np.float32)
    assert has_whole_numbers(ir.tensor(codes))
    first_bias = np.repeat(np.array([[0, 1, 0, 0]], np.float32), 3)[None]  # of an LSTM's gates
    for array in (codes * 0.3, np.ones((3, 3)), np.zeros((3, 3)), first_bias):
        assert not has_whole_numbers(ir.tensor(array.astype(np.float32)))
