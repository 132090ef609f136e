"""Micro-batches that are open at once give the bits of those that follow each other."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from splitonnx.bundles import Bundle
from splitonnx.manifests import Role
from splitonnx.names import ACCUMULATE, Target
from splitonnx.optimizers import AdamW
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut, cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts
from splitonnx.runtime.engine.dataflows import can_overlap
from tests.support.carried import AVERAGES, build_averages
from tests.support.interleavings import Choose, Interleaving
from tests.support.zoo import ZOO, Arrays

ROWS, STEPS, PARTS = 9, 2, 4
"""Micro-batches of 3, 2, 2 and 2 rows make a step."""


@cache
def prepare_zoo(name: str) -> tuple[PreparedModel, tuple[str, ...]]:
    prepared = prepare(open_model(ZOO[name].build()))
    return prepared, tuple(found.tensor for found in list_cuts(prepared, None))


def cut_zoo(name: str, shape: str, target: Target, clip: float | None = 1.0) -> Bundle:
    prepared, cuts = prepare_zoo(name)
    at, tail = {
        "vanilla": (cuts[len(cuts) // 2], ()),
        "U-shaped": (cuts[0], cuts[-1]),
    }[shape]
    return cut_prepared(
        prepared,
        at=at,
        tail_at=tail,
        loss=ZOO[name].loss,
        optimizer=AdamW(lr=1e-2, clip_norm=clip),
        client_target=target,
        server_target=target,
    )


def hold(bundle: Bundle, batches: list[Arrays], examples: int) -> dict[str, np.ndarray]:
    """Compare many orders with the one in which each micro-batch waits for the one before it."""
    trained = Interleaving.make(bundle, PARTS)
    expected = trained.train(batches, 1, lambda _: 0)

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(in_flight=st.integers(2, PARTS + 1), order=st.randoms(use_true_random=False))
    def compare(in_flight: int, order: st.DataObject) -> None:
        choose: Choose = order.randrange  # type: ignore[attr-defined]
        found = trained.train(batches, in_flight, choose)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)

    compare()
    return expected


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("shape", ["vanilla", "U-shaped"])
@pytest.mark.parametrize("name", ZOO)
def test_any_order_gives_the_same_bits(name: str, shape: str, target: Target) -> None:
    bundle = cut_zoo(name, shape, target)
    assert all(can_overlap(p.manifest.phase(ACCUMULATE), n) for n, p in bundle.parties.items())
    before = {n: a for party in bundle.parties.values() for n, a in party.state().items()}
    found = hold(bundle, [ZOO[name].data(ROWS, seed=seed) for seed in range(STEPS)], 8)
    for party in bundle.parties.values():
        for spec in party.manifest.state:
            if spec.role in (Role.PARAMETER, Role.BUFFER):
                assert not np.array_equal(found[spec.tensor.name], before[spec.tensor.name])


def test_steps_without_clipping_too() -> None:
    batches = [ZOO["batchnorm_trained"].data(ROWS, seed=seed) for seed in range(STEPS)]
    hold(cut_zoo("batchnorm_trained", "U-shaped", "portable", clip=None), batches, 20)


@pytest.mark.parametrize(("at", "tail_at"), [("z", ()), ("h", ()), ("z", "p"), ("h", "z")])
def test_states_that_a_model_hands_itself_pass_from_one_micro_batch_to_the_next(
    at: str, tail_at: str | tuple[str, ...]
) -> None:
    bundle = cut(
        build_averages(),
        at=at,
        tail_at=tail_at,
        loss="mse",
        output="y",
        states=AVERAGES,
        optimizer=AdamW(lr=1e-2),
    )
    random = np.random.default_rng(2)
    batches: list[Arrays] = [
        {
            "x": random.standard_normal((ROWS, 3), np.float32),
            "labels": random.standard_normal((ROWS, 2), np.float32),
        }
        for _ in range(STEPS)
    ]
    found = hold(bundle, batches, 10)
    assert found["count_in"] == STEPS * PARTS
