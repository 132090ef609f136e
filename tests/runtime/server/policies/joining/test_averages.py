"""Averages weigh by samples, and lose no bit where all clients have the same tensors."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.runtime.server.policies.joining.averages import average, mix


def test_tensors_weigh_by_the_samples_that_they_were_trained_with() -> None:
    first, second = np.array([1, 10], np.float32), np.array([4, 40], np.float32)
    found = average([(1, {"w": first}), (2, {"w": second})])
    np.testing.assert_array_equal(found["w"], np.array([3, 30], np.float32))
    assert found["w"].dtype == np.float32


def test_without_any_samples_all_weigh_alike() -> None:
    found = average([(0, {"w": np.array(value)}) for value in (1.0, 2.0, 6.0)])
    assert found["w"] == 3.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equal_tensors_are_their_own_average_to_the_bit(dtype: type[np.floating]) -> None:
    array = np.random.default_rng(3).normal(size=(5, 7)).astype(dtype)
    found = average([(n, {"w": array.copy()}) for n in (3, 5, 11)])
    assert (found["w"].dtype, found["w"].tobytes()) == (array.dtype, array.tobytes())


def test_one_client_keeps_what_it_learned_to_the_bit() -> None:
    array = np.random.default_rng(4).normal(size=9).astype(np.float32)
    assert average([(7, {"w": array})])["w"].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_mix_goes_a_part_of_the_way_and_keeps_the_dtype(dtype: type[np.floating]) -> None:
    generator = np.random.default_rng(5)
    base, other = (generator.normal(size=(4, 3)).astype(dtype) for _ in range(2))
    found = mix({"w": base, "left": base}, {"w": other}, 0.3)
    assert list(found) == ["w"]
    exact = base.astype(np.longdouble) * 0.7 + other.astype(np.longdouble) * 0.3
    assert found["w"].dtype == dtype
    np.testing.assert_allclose(found["w"], exact, rtol=0, atol=2 * float(np.finfo(dtype).eps))


def test_a_mix_of_equal_tensors_keeps_every_bit_and_a_weight_of_0_the_base() -> None:
    base, other = (np.random.default_rng(n).normal(size=99) for n in (6, 7))
    assert mix({"w": base}, {"w": base.copy()}, 0.6 / 7**0.5)["w"].tobytes() == base.tobytes()
    assert mix({"w": base}, {"w": other}, 0.0)["w"].tobytes() == base.tobytes()


def test_a_mix_does_not_overflow_between_numbers_at_the_ends_of_the_range() -> None:
    most = np.finfo(np.float64).max
    found = mix({"w": np.array([-most, most])}, {"w": np.array([most, most])}, 0.5)
    np.testing.assert_array_equal(found["w"], [0.0, most])


def test_a_single_number_is_mixed_to_a_single_number() -> None:
    found = mix({"w": np.array(1.0)}, {"w": np.array(3.0)}, 0.25)
    assert (found["w"].shape, float(found["w"])) == ((), 1.5)
