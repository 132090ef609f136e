"""The table of shipped networks: each stands in it once, and its data can be drawn."""

from __future__ import annotations

import numpy as np
import pytest

from tests.sweeps.shipped_networks import (
    BATCH,
    STEPS,
    Network,
    draw,
    draw_batches,
    read_networks,
)

NETWORKS = read_networks()


def test_the_table_holds_each_network_once_and_names_its_bytes() -> None:
    for values in (
        [network.name for network in NETWORKS],
        [(network.package, network.path) for network in NETWORKS],
        [network.sha256 for network in NETWORKS],
    ):
        assert len(values) == len(set(values)) > 20
    assert all(len(network.sha256) == 64 for network in NETWORKS)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_data_are_drawn_for_every_step(network: Network) -> None:
    batches = draw_batches(network, np.random.default_rng(0))
    if network.whole_batches:
        assert len(batches) == STEPS
    else:
        assert {len(array) for batch in batches for array in batch.values()} == {BATCH * STEPS}
    assert all(set(batch) == {*network.arrays, "labels"} for batch in batches)


def test_an_array_is_drawn_as_its_description_says() -> None:
    random = np.random.default_rng(0)
    floats = draw("f4 3 160", (4,), random)
    assert floats.shape == (4, 3, 160)
    assert floats.dtype == np.float32
    assert abs(floats.std() - 1) < 0.1
    whole = draw("i8 50 < 20", (), random)
    assert whole.dtype == np.int64
    assert set(whole.tolist()) <= set(range(20))
    assert draw("? 3 = 1", (2,), random).all()
