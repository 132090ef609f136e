"""Explain what leaves a client in each phase, and prove from its graphs that nothing else does.

The manifest declares what is sent.  The stage graphs show for each array of data which of these
tensors depend on it, and by which way.  Neither ONNX Runtime nor the onnx package is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from splitonnx.bundles import PartyBundle
from splitonnx.disclosures import LABELS, RAW_INPUT, Sending, SentTensor, find_labels, list_sent
from splitonnx.errors import UsageError
from splitonnx.manifests import PartyManifest, Phase, Role
from splitonnx.names import CLIENT, EVALUATE, PREDICT, SERVER
from splitonnx.runtime.client.flows import Dependence, Extent, Flow
from splitonnx.tensors import TensorSpec

MOST_LAYERS = 3
"""The most layers that a sentence names."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """The dependence of one tensor that leaves on one array; ``is_itself`` if it is the array."""

    tensor: SentTensor
    is_itself: bool
    dependence: Dependence

    def __str__(self) -> str:
        if self.is_itself:
            return "leaves as it is"
        if self.dependence.extent is Extent.SIZES:
            return f"{self.tensor.name} depends on its sizes alone"
        layers = self.dependence.layers
        named = ", ".join(map(str, layers[:MOST_LAYERS]))
        more = f" and {len(layers) - MOST_LAYERS} more" if len(layers) > MOST_LAYERS else ""
        through = f"through {named}{more}" if layers else ""
        bare = "without any weight between them" if self.dependence.is_bare else ""
        return (
            f"{self.tensor.name} depends on it {' and also '.join(filter(None, (through, bare)))}"
        )


@dataclass(frozen=True, kw_only=True)
class ArrayExplanation:
    """Where one array of data goes in a phase.

    ``kind`` is ``raw input`` or ``labels``.  ``ways`` lead to tensors that leave; without one,
    nothing that leaves depends on the array.  ``updates`` counts the client's weights and running
    statistics that a step changes by it: what later steps send depends on these.
    """

    name: str
    kind: str
    declared: str
    ways: tuple[Way, ...]
    updates: int


@dataclass(frozen=True, kw_only=True)
class PhaseExplanation:
    """What leaves and arrives in each step of a phase, and where each array of data goes.

    ``stages`` are the graphs that were read.  ``kept`` counts their outputs that do not leave.
    """

    leaves: Sending
    arrives: Sending
    arrays: tuple[ArrayExplanation, ...]
    stages: tuple[str, ...]
    kept: int


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All that leaves a client, by phase."""

    digest: str
    phases: tuple[PhaseExplanation, ...]


def explain(bundle: str | Path | PartyBundle, *, batch: int | None = None) -> Explanation:
    """Explain what leaves the client and what comes in, with the proof from its graphs.

    Args:
        bundle: the client's folder, or the client's part if it is already loaded.
        batch: the number of samples of a step, to know sizes in bytes.

    Raises:
        BundleError, FormatError: the folder cannot be used.
        ForbiddenGraph: a graph cannot be read, such as one exported for mobile apps.
        UsageError: this is the server's part.
    """
    party = bundle if isinstance(bundle, PartyBundle) else PartyBundle.load(bundle)
    manifest = party.manifest
    if manifest.party != CLIENT:
        raise UsageError(f"this is the {manifest.party}'s part; explain reads the client's")
    phases = tuple(_explain_phase(party, phase, batch) for phase in manifest.phases)
    return Explanation(digest=manifest.digest, phases=phases)


def _explain_phase(party: PartyBundle, phase: Phase, batch: int | None) -> PhaseExplanation:
    manifest, flow = party.manifest, Flow(party, phase)
    leaves = list_sent(manifest, phase.name, CLIENT, batch)
    made = {name for stage in phase.stages for name in stage.outputs}
    return PhaseExplanation(
        leaves=leaves,
        arrives=list_sent(manifest, phase.name, SERVER, batch),
        arrays=tuple(
            _explain_array(party, flow, phase, spec, leaves)
            for spec in _list_arrays(manifest, phase)
        ),
        stages=tuple(stage.name for stage in phase.stages),
        kept=len(made - {tensor.wire for tensor in leaves.tensors}),
    )


def _list_arrays(manifest: PartyManifest, phase: Phase) -> list[TensorSpec]:
    """List the arrays of a phase that are the user's, without the predictions that it measures."""
    predicted = manifest.phase(PREDICT).results if phase.name == EVALUATE else ()
    return [spec for spec in phase.data if spec.name not in predicted]


def _explain_array(
    party: PartyBundle, flow: Flow, phase: Phase, spec: TensorSpec, leaves: Sending
) -> ArrayExplanation:
    ways = []
    kept = {s.tensor.name for s in party.manifest.state if s.role is not Role.OPTIMIZER}
    for tensor in leaves.tensors:
        dependence = flow.find_dependence(spec.name, tensor.wire)
        if dependence is not None:
            is_itself = tensor.kind in (RAW_INPUT, LABELS) and tensor.tensor == spec.name
            ways.append(Way(tensor=tensor, is_itself=is_itself, dependence=dependence))
    return ArrayExplanation(
        name=spec.name,
        kind=LABELS if spec.name == find_labels(party.manifest) else RAW_INPUT,
        declared=str(spec),
        ways=tuple(ways),
        updates=flow.count_dependent(
            spec.name, [made for name, made in phase.commits.items() if name in kept]
        ),
    )
