"""Write a party's trained state to its folder, as the outcome of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import BundleError
from splitonnx.states import State, check_finite_state, check_home, write_state


def publish_state(
    party: PartyBundle,
    tensors: Mapping[str, np.ndarray],
    *,
    step: int,
    session: str,
    position: str,
    owner: str,
) -> None:
    """Write a state to the party's folder as the outcome of training.

    The outcome is written atomically.  ``session`` is the session that trained the state, and
    ``owner`` is the session's owner.  ``position`` is the position in the data at which training
    stopped.

    Raises:
        BundleError: the bundle exists only in memory, or the folder cannot be written.
        StateNotFinite: the state contains NaN or infinity.
        NotSaved: the folder was deleted or replaced after it was loaded.
    """
    folder = check_outcome(party, tensors)
    state = State(tensors=tensors, step=step, session=session, position=position, owner=owner)
    write_state(folder, state, party.manifest.digest)


def check_outcome(party: PartyBundle, tensors: Mapping[str, np.ndarray]) -> Path:
    """Check that a state may be published, and return the folder that it goes to.

    Raises:
        BundleError, StateNotFinite, NotSaved: as raised by :func:`publish_state`.
    """
    if party.path is None:
        raise BundleError("bundle in memory", "it has no folder to save the state in")
    check_home(party.path, party.manifest.digest)
    check_finite_state(party.path, tensors, party.manifest.state)
    return party.path
