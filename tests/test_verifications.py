"""The promise, checked on a model: what counts as equal, and what is compared."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import UsageError
from splitonnx.optimizers import SGD
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import StepComparison, Verification, leave_whole, verify
from tests.support.zoo import ZOO

DATA = ZOO["chain"].data(24)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


def compare(**differences: float) -> StepComparison:
    return StepComparison(step=0, split_loss=1.0, whole_loss=1.0, differences=differences)


def test_a_step_differs_by_what_differs_most() -> None:
    assert compare(loss=0.0, w=0.5, b=0.25).difference == 0.5


@pytest.mark.parametrize(("rtol", "ok"), [(0.5, True), (0.49, False), (1.0, True)])
def test_all_steps_have_to_stay_within_the_tolerance(rtol: float, ok: bool) -> None:
    found = Verification(steps=(compare(loss=0.5), compare(loss=0.0)), rtol=rtol)
    assert found.largest_difference == 0.5
    assert found.ok is ok


def test_a_difference_that_is_no_number_is_not_equal() -> None:
    assert not Verification(steps=(compare(loss=float("nan")),), rtol=1.0).ok


def test_loss_and_every_parameter_are_compared_step_by_step(bundle: Bundle) -> None:
    found = verify(bundle, DATA, steps=2, batch_size=8)
    assert [step.step for step in found.steps] == [0, 1]
    parameters = {name for party in bundle.parties.values() for name in party.weights}
    assert found.steps[0].differences.keys() == {"loss", *parameters}
    assert found.largest_difference == 0  # the same kernels in one thread
    assert found.steps[0].split_loss == found.steps[0].whole_loss
    assert found.steps[1].split_loss != found.steps[0].split_loss


def test_a_part_that_trains_another_way_is_found(bundle: Bundle) -> None:
    """The server's stages are those of another learning rule."""
    other = cut(ZOO["chain"].build(), at="act1", tail_at="act3", optimizer=SGD(lr=0.5))
    lamed = dict(bundle.parties)
    lamed["client"] = replace(
        lamed["client"],
        manifest=msgspec.structs.replace(lamed["client"].manifest, learning_rate=0.5),
    )
    found = verify(replace(bundle, parties=lamed), DATA, steps=1, batch_size=8, rtol=1e-5)
    assert not found.ok
    assert found.steps[0].differences["loss"] == 0  # it is taken before the first update
    assert verify(other, DATA, steps=1, batch_size=8).ok


def test_the_whole_model_has_every_parameter_and_one_party(bundle: Bundle) -> None:
    whole = leave_whole(bundle)
    assert set(whole.parties) == {"client"}
    weights = {n: array for party in bundle.parties.values() for n, array in party.weights.items()}
    assert whole.client.weights.keys() == weights.keys()
    for name, array in whole.client.weights.items():
        np.testing.assert_array_equal(array, weights[name])


def test_a_trained_bundle_is_compared_from_its_start(bundle: Bundle) -> None:
    client = bundle.client
    trained = {name: np.full_like(array, 0.5) for name, array in client.state().items()}
    later = replace(bundle, parties={**bundle.parties, "client": replace(client, trained=trained)})
    first = verify(bundle, DATA, steps=1, batch_size=8).steps[0]
    assert verify(later, DATA, steps=1, batch_size=8).steps[0].split_loss == first.split_loss


@pytest.mark.parametrize("steps", [0, -1])
def test_at_least_one_step_is_compared(bundle: Bundle, steps: int) -> None:
    with pytest.raises(UsageError, match=f"not {steps}"):
        verify(bundle, DATA, steps=steps)


def test_no_more_steps_are_compared_than_there_are_data_for(bundle: Bundle) -> None:
    assert len(verify(bundle, DATA, steps=99, batch_size=8).steps) == 3
