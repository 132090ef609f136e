"""Count the bytes of what a party has in memory during a training step: state, stash and wires.

Sizes come from the declarations of a bundle.  What kernels need while they run is not counted: it
is about the largest results of two or three neighbouring layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import onnx

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.disclosures import bind_rows, count_bytes, list_sent, name_rows
from splitonnx.errors import UsageError
from splitonnx.losses import LossSource
from splitonnx.manifests import Phase, Role, Source
from splitonnx.names import CLIENT, SERVER, TRAIN
from splitonnx.partitioner.cutting.ports import declare
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.cutting.transforms.recomputations import recompute_stages
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.readings import read_model
from splitonnx.partitioner.partitions import cut_prepared
from splitonnx.tensors import DTYPES, TensorSpec

_UPDATING = frozenset({"norms", "update"})
"""Stages that begin when no stash is left, only gradients."""


@dataclass(frozen=True, kw_only=True)
class PartyMemory:
    """The bytes that a party needs in a training step with ``batch`` samples.

    ``parameters`` counts weights, running statistics and states.  ``optimizer`` is the optimizer's
    state.  ``stash`` is what is kept from forward to backward stages, and ``stash_recomputed`` what
    is kept of it with ``--recompute``.  ``wires`` is all that is sent and received.  The last three
    are ``None`` if a size is unknown.
    """

    party: str
    batch: int
    parameters: int
    optimizer: int
    gradients: int
    stash: int | None
    stash_recomputed: int | None
    wires: int | None

    @property
    def waiting(self) -> int | None:
        """Return the bytes held while the party waits for gradients."""
        return self._add(self.stash)

    @property
    def waiting_recomputed(self) -> int | None:
        """Return the bytes held while the party waits for gradients, with ``--recompute``."""
        return self._add(self.stash_recomputed)

    @property
    def peak(self) -> int | None:
        """Return the most bytes at a time, with and without ``--recompute``.

        They are held when the backward stage begins, or when the update makes the new state beside
        the old one.
        """
        backward = self._add(self.stash)
        update = 2 * (self.parameters + self.optimizer) + self.gradients
        return None if backward is None else max(backward, update)

    def _add(self, stash: int | None) -> int | None:
        if stash is None or self.wires is None:
            return None
        return self.parameters + self.optimizer + stash + self.wires


@attribute_errors_to_pass("measured")
def estimate_memory(
    prepared: PreparedModel,
    at: Sequence[str],
    tail_at: Sequence[str],
    loss: LossSource,
    batch: int,
) -> tuple[PartyMemory, ...]:
    """Estimate the memory of each party of a cut with the default optimizer.

    Raises:
        CutError: the tensors do not exist or do not divide the model.
    """
    bundle = cut_prepared(prepared, at=at, tail_at=tail_at, loss=loss)
    return measure_bundle(bundle, batch)


def measure_bundle(bundle: Bundle, batch: int) -> tuple[PartyMemory, ...]:
    """Estimate the memory that each party of a bundle needs for a batch."""
    try:
        repeating = recompute_stages(bundle, True)
    except UsageError:  # no party keeps anything
        repeating = bundle
    return tuple(
        _measure(party, repeating.parties[name], batch) for name, party in bundle.parties.items()
    )


def _measure(party: PartyBundle, repeating: PartyBundle, batch: int) -> PartyMemory:
    sizes: dict[Role, int] = dict.fromkeys(Role, 0)
    for spec in party.manifest.state:
        dims = [dim for dim in spec.tensor.shape if isinstance(dim, int)]
        sizes[spec.role] += DTYPES[spec.tensor.dtype].itemsize * prod(dims)
    sendings = [list_sent(party.manifest, TRAIN, sender, batch) for sender in (CLIENT, SERVER)]
    sent = [sending.bytes for sending in sendings]
    return PartyMemory(
        party=party.manifest.party,
        batch=batch,
        parameters=sum(sizes.values()) - sizes[Role.OPTIMIZER],
        optimizer=sizes[Role.OPTIMIZER],
        gradients=sizes[Role.PARAMETER],
        stash=_count_stash(party, batch),
        stash_recomputed=_count_stash(repeating, batch),
        wires=_add(sent),
    )


def _count_stash(party: PartyBundle, batch: int) -> int | None:
    """Count the bytes of what is kept while a party waits for the other, at its most."""
    phase = party.manifest.phase(TRAIN)
    sizes = bind_rows(name_rows(party.manifest, phase), batch)
    declared = _declare_outputs(party, phase)
    wires = {wire.tensor.name for wire in phase.wires}
    waits, arrived = [], set[str]()
    for index, stage in enumerate(phase.stages):
        received = {i.name for i in stage.inputs if i.source is Source.WIRE}
        received |= wires.intersection(stage.awaited)
        if received - arrived:
            arrived |= received
            earlier, later = phase.stages[:index], phase.stages[index:]
            read = {i.name for s in later if s.name not in _UPDATING for i in s.inputs}
            again = {name for s in later if s.awaited for name in s.outputs}
            kept = {name for s in earlier for name in s.outputs if name in read - again}
            waits.append(_add(count_bytes(declared[name], sizes) for name in kept))
    return None if None in waits else max((size or 0 for size in waits), default=0)


def _declare_outputs(party: PartyBundle, phase: Phase) -> dict[str, TensorSpec]:
    """Declare all results of a phase's stages as their graphs do."""
    files = {stage.graph for stage in phase.stages if stage.name not in _UPDATING}
    graphs = [read_model(onnx.load_from_string(party.graphs[file])).graph for file in files]
    return {value.name or "": declare(value) for graph in graphs for value in graph.outputs}


def _add(sizes: Iterable[int | None]) -> int | None:
    known = list(sizes)
    return None if None in known else sum(size or 0 for size in known)
