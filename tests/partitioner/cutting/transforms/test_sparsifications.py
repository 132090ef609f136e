"""Codecs that send some numbers of each sample, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.partitioner.cutting.transforms.sparsifications import RandomTopK, TopK
from splitonnx.tensors import TensorSpec
from tests.support.encodings import Make, decode, encode


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape, np.float32)


def keep_largest(x: np.ndarray, count: int) -> np.ndarray:
    rows = x.reshape(len(x), -1)
    kept = np.argsort(-np.abs(rows), axis=1)[:, :count]
    made = np.zeros_like(rows)
    np.put_along_axis(made, kept, np.take_along_axis(rows, kept, 1), 1)
    return made.reshape(x.shape)


@pytest.mark.parametrize(("shape", "count"), [((4, 30), 3), ((2, 3, 5, 7), 11), ((1, 2), 1)])
def test_topk_sends_the_largest_numbers_of_each_sample(shape: tuple[int, ...], count: int) -> None:
    x, make = draw(shape), lambda key: TopK(0.1)
    sent = encode(make, x)
    assert sent["values"].shape == (shape[0], count)
    assert sent["places"].dtype == np.uint16
    np.testing.assert_array_equal(decode(make, sent, x), keep_largest(x, count))


def test_a_large_sample_has_places_of_32_bits() -> None:
    x = np.zeros((1, 1 << 17), np.float32)
    x[0, -3] = -2.0
    sent = encode(lambda key: TopK(1e-5), x)
    assert sent["places"].dtype == np.int32
    np.testing.assert_array_equal(decode(lambda key: TopK(1e-5), sent, x), x)


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_values_tell_that_a_number_was_not_finite_even_if_it_is_not_sent(odd: float) -> None:
    x = draw((2, 40))
    x[1, 3] = odd
    sent = encode(lambda key: TopK(0.1), x)
    assert np.isfinite(sent["values"][0]).all()
    assert not np.isfinite(sent["values"][1]).any()


def test_places_beyond_the_end_stay_within_the_tensor() -> None:
    sent = {
        "values": np.array([[1.0, 2.0]], np.float32),
        "places": np.array([[65535, -7]], np.int32),
    }
    found = decode(lambda key: TopK(0.5), sent, np.zeros((1, 6), np.float32))
    np.testing.assert_array_equal(found, [[2, 0, 0, 0, 0, 1]])


def make_random(name: str = "h") -> Make:
    return lambda key: RandomTopK(0.2, key, name)


def test_randtopk_draws_a_tenth_of_what_it_keeps_among_the_others() -> None:
    x = np.sort(np.abs(draw((6, 500))), axis=1)
    places = encode(make_random(), x, (1, 2, 3))["places"]
    assert places.shape == (6, 100)
    assert all(len(set(row)) == 100 for row in places.tolist())
    largest = (places >= 410).sum(1)  # the 90 that are always sent are the last
    assert (largest >= 90).all()
    assert (largest < 100).any()


def test_what_is_drawn_depends_on_the_key_and_the_name_alone() -> None:
    x = draw((4, 200))
    first = encode(make_random(), x, (1, 2, 3))
    again = encode(make_random(), x, (1, 2, 3))
    np.testing.assert_array_equal(first["places"], again["places"])
    for make, key in [(make_random(), (1, 3, 3)), (make_random("g"), (1, 2, 3))]:
        other = encode(make, x, key)["places"]
        assert (np.sort(first["places"]) != np.sort(other)).any()


def test_each_number_is_drawn_now_and_then() -> None:
    x = np.tile(np.sort(np.abs(draw((1, 50))), axis=1), (200, 1))
    places = encode(make_random(), x, (5, 0, 0))["places"]  # 9 largest, and one of 41
    counts = np.bincount(places.ravel(), minlength=50)
    assert (counts[41:] == 200).all()
    assert counts[:41].sum() == 200
    assert counts[:41].max() < 20  # about 5 each


def test_what_is_not_smaller_is_refused() -> None:
    wide = TensorSpec(name="x", dtype="F32", shape=("N", 100))
    assert not TopK(0.5).refuse(wide)
    assert "keep a smaller part" in TopK(0.7).refuse(wide)
    one = TensorSpec(name="x", dtype="F32", shape=("N", 1))
    assert "a sample has 1 elements" in TopK(0.1).refuse(one)
