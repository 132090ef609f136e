"""An outcome goes to the party's folder, unless it must not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import BundleError, StateNotFinite
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.storage.outcomes import check_outcome, publish_state
from tests.support.zoo import ZOO


def publish(party: PartyBundle, tensors: dict[str, np.ndarray]) -> None:
    publish_state(party, tensors, step=3, session="b" * 32, position="", owner="ann")


def test_what_is_published_is_read_back(tmp_path: Path) -> None:
    cut(ZOO["chain"].build(), at="act0").save(tmp_path / "bundle")
    party = Bundle.load(tmp_path / "bundle").client
    state = {name: array + 1 for name, array in party.state().items()}
    publish(party, state)
    found = Bundle.load(tmp_path / "bundle").client
    assert (found.step, found.owner) == (3, "ann")
    for name, array in state.items():
        np.testing.assert_array_equal(found.state()[name], array)


def test_a_state_with_nan_or_without_a_folder_is_not_published(tmp_path: Path) -> None:
    bundle = cut(ZOO["chain"].build(), at="act0")
    with pytest.raises(BundleError, match="no folder"):
        check_outcome(bundle.client, bundle.client.state())
    bundle.save(tmp_path / "bundle")
    party = PartyBundle.load(tmp_path / "bundle" / "client")
    state = {name: np.full_like(array, np.nan) for name, array in party.state().items()}
    with pytest.raises(StateNotFinite):
        publish(party, state)
    assert PartyBundle.load(tmp_path / "bundle" / "client").step == 0
