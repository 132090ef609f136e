"""Codecs that round, against numpy and ml_dtypes, over zeros, denormals and huge numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from splitonnx.partitioner.cutting.transforms.encodings import Encoding
from splitonnx.partitioner.cutting.transforms.quantizations import (
    BLOCK,
    BlockInt4,
    BrainFloat16,
    ChannelInt8,
    Float16,
)
from splitonnx.tensors import TensorSpec
from tests.support.encodings import decode, encode

LARGEST = np.finfo(np.float32).max
SHAPES = [(3, 5), (2, 3, 4, 4), (4, 7, 6)]


def draw(shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32) * np.float32(scale)


def awkward() -> np.ndarray:
    """Zeros, denormals, the ends of float32, ties and powers of two, as one sample each."""
    powers = 2.0 ** np.arange(-149, 128)
    near = [np.nextafter(p.astype("f4"), np.float32(s)) for p in powers for s in (0, np.inf)]
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 2 - 2**-9, 2 - 2**-8]
    edges = [0.0, -0.0, LARGEST, -LARGEST, 1e-45, -1e-45, 1.1754944e-38, 65504, 65520, 3.39e38]
    numbers = np.array([*powers, *near, *ties, *edges], np.float32)
    return np.concatenate([numbers, -numbers]).reshape(-1, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp16_is_the_nearest_float16(shape: tuple[int, ...]) -> None:
    x = draw(shape)
    sent = encode(lambda key: Float16(), x)
    np.testing.assert_array_equal(sent["fp16"], x.astype(np.float16))
    np.testing.assert_array_equal(
        decode(lambda key: Float16(), sent, x), x.astype("f2").astype("f4")
    )


def test_fp16_makes_what_it_cannot_hold_infinite() -> None:
    x = np.array([[65504.0, 1e6], [-1e6, np.nan]], np.float32)
    found = decode(lambda key: Float16(), encode(lambda key: Float16(), x), x)
    np.testing.assert_array_equal(found, [[65504, np.inf], [-np.inf, np.nan]])


@pytest.mark.parametrize("x", [*map(draw, SHAPES), awkward()], ids=["2d", "4d", "3d", "odd"])
def test_bf16_is_the_nearest_bfloat16_bit_for_bit(x: np.ndarray) -> None:
    sent = encode(lambda key: BrainFloat16(), x)
    wanted = x.astype(ml_dtypes.bfloat16)
    is_zero = x == 0  # the sign of zero is not sent
    np.testing.assert_array_equal(
        np.where(is_zero, 0, sent["bf16"]), np.where(is_zero, 0, wanted.view(np.uint16))
    )
    found = decode(lambda key: BrainFloat16(), sent, x)
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


def test_bf16_keeps_what_is_not_finite() -> None:
    x = np.array([[np.nan, np.inf], [-np.inf, 1.5]], np.float32)
    found = decode(lambda key: BrainFloat16(), encode(lambda key: BrainFloat16(), x), x)
    np.testing.assert_array_equal(found, x)


def test_every_code_of_bf16_is_decoded_as_its_bits_say() -> None:
    codes = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 4)
    found = decode(lambda key: BrainFloat16(), {"bf16": codes}, codes)
    np.testing.assert_array_equal(found, codes.view(ml_dtypes.bfloat16).astype(np.float32))


def round_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales, as the docstring of the codec says, in numpy."""
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    scale = np.abs(x).max(axes) / np.float32(127)
    largest = np.nextafter(LARGEST / np.float32(127), np.float32(0))
    scale = np.clip(scale, np.float32(2.0**-126), largest)
    along = scale.reshape([-1 if axis == 1 else 1 for axis in range(x.ndim)])
    return np.clip(np.rint(x / along), -127, 127).astype(np.int8), scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_int8_rounds_each_channel_by_its_own_scale(shape: tuple[int, ...], scale: float) -> None:
    x = draw(shape, scale) * np.arange(1, shape[1] + 1, dtype=np.float32).reshape(
        [-1 if axis == 1 else 1 for axis in range(len(shape))]
    )
    sent = encode(lambda key: ChannelInt8(), x)
    codes, scales = round_int8(x)
    np.testing.assert_array_equal(sent["scale"], scales[np.newaxis])
    np.testing.assert_array_equal(sent["int8"], codes)
    found = decode(lambda key: ChannelInt8(), sent, x)
    along = scales.reshape([-1 if axis == 1 else 1 for axis in range(len(shape))])
    np.testing.assert_array_equal(found, codes.astype(np.float32) * along)
    assert (np.abs(found - x) <= 0.5001 * along).all()


def test_int8_keeps_zeros_and_constant_channels() -> None:
    x = np.zeros((4, 3, 2), np.float32)
    x[:, 1], x[:, 2] = 7.25, -1e-3
    found = decode(lambda key: ChannelInt8(), encode(lambda key: ChannelInt8(), x), x)
    np.testing.assert_allclose(found, x, rtol=1e-6)
    assert not found[:, 0].any()


def test_int8_takes_denormals_for_zero_and_the_largest_numbers_for_finite_ones() -> None:
    x = np.array([[1e-40, LARGEST], [-1e-42, -LARGEST]], np.float32)
    found = decode(lambda key: ChannelInt8(), encode(lambda key: ChannelInt8(), x), x)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 1], x[:, 1], rtol=1e-2)
    np.testing.assert_allclose(found[:, 0], 0, atol=1e-38)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", [ChannelInt8, BlockInt4])
def test_a_scale_tells_that_a_number_was_not_finite(odd: float, codec: type[Encoding]) -> None:
    x = draw((2, 40))
    x[1, 3] = odd
    assert np.isnan(encode(lambda key: codec(), x)["scale"]).sum() == 1


@pytest.mark.parametrize("width", [16, 33, 64, 65, 200])
def test_int4_rounds_each_block_by_its_own_scale(width: int) -> None:
    x = draw((3, width)) * np.linspace(0.01, 10, width, dtype=np.float32)
    sent = encode(lambda key: BlockInt4(), x)
    found = decode(lambda key: BlockInt4(), sent, x)
    size = min(BLOCK, width + width % 2)
    assert sent["int4"].nbytes == 3 * size * -(-width // size) // 2
    for start in range(0, width, size):
        block = x[:, start : start + size]
        scale = np.abs(block).max(1, keepdims=True) / np.float32(7)
        np.testing.assert_array_equal(
            found[:, start : start + size], np.rint(block / scale) * scale
        )


def test_int4_keeps_zeros_and_the_largest_numbers_finite() -> None:
    x = np.zeros((2, 3, 8, 8), np.float32)
    x[1, 1] = LARGEST
    found = decode(lambda key: BlockInt4(), encode(lambda key: BlockInt4(), x), x)
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_allclose(found, x, rtol=1e-6)
    assert np.isfinite(found).all()


def test_every_byte_of_int4_is_decoded() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(8, 32)
    sent: dict[str, np.ndarray] = {"int4": codes, "scale": np.ones((8, 1), np.float32)}
    found = decode(lambda key: BlockInt4(), sent, np.zeros((8, 64), np.float32))
    wanted = np.stack([codes % 16, codes // 16], -1).reshape(8, 64).astype(np.float32) - 8
    np.testing.assert_array_equal(found, wanted)


def test_what_cannot_be_encoded_says_why() -> None:
    vector = TensorSpec(name="x", dtype="F32", shape=("N",))
    free = TensorSpec(name="x", dtype="F32", shape=("N", "T", 4))
    few = TensorSpec(name="x", dtype="F32", shape=("N", 5))
    assert "1 dimensions" in ChannelInt8().refuse(vector)
    assert not ChannelInt8().refuse(free)
    assert "'T' is not known" in BlockInt4().refuse(free)
    assert "5 elements" in BlockInt4().refuse(few)
    assert not Float16().refuse(vector)
    assert not BrainFloat16().refuse(vector)
