"""Explain which tensors leave the client in each phase, and on which data each of them depends.

The manifest lists the tensors that are sent.  The stage graphs show which of them depend on each
raw input or on the labels, and through which layers.  This module needs neither ONNX Runtime nor
the onnx package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from splitonnx.bundles import PartyBundle
from splitonnx.disclosures import (
    LABELS,
    RAW_INPUT,
    Sending,
    SentTensor,
    describe_raw_states,
    list_labels,
    list_sent,
)
from splitonnx.errors import UsageError
from splitonnx.manifests import PartyManifest, Phase, Role, WireKind
from splitonnx.names import CLIENT, EVALUATE, PREDICT, SERVER, SHARE, WEIGH
from splitonnx.runtime.client.flows import Dependence, Extent, Flow
from splitonnx.tensors import TensorSpec

MOST_LAYERS = 3
"""The maximum number of layers that a sentence names."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How one tensor that leaves the client depends on one array of the client's data.

    ``is_itself`` means that the tensor is the array itself.
    """

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
        bare = "without any layer of weights between them" if self.dependence.is_bare else ""
        return (
            f"{self.tensor.name} depends on it {' and also '.join(filter(None, (through, bare)))}"
        )


@dataclass(frozen=True, kw_only=True)
class ArrayExplanation:
    """How one array of the client's data is used in a phase.

    ``kind`` is ``raw input`` or ``labels``, and ``declared`` is the array's type and shape.
    ``ways`` has one entry for each tensor that leaves the client and depends on the array.
    ``updates`` is the number of the client's weights and running statistics that are updated with
    values computed from the array.  Tensors sent in later steps may depend on the array through
    these updates.
    """

    name: str
    kind: str
    declared: str
    ways: tuple[Way, ...]
    updates: int


@dataclass(frozen=True, kw_only=True)
class PhaseExplanation:
    """What the client sends and receives in each step of a phase, and how its data are used.

    ``arrays`` has one entry for each array of the client's data that the phase uses.
    ``stages`` are the names of the stages that were analyzed.  ``kept`` is the number of outputs of
    these stages that do not leave the client.
    """

    leaves: Sending
    arrives: Sending
    arrays: tuple[ArrayExplanation, ...]
    stages: tuple[str, ...]
    kept: int


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Everything that a client sends and receives, by phase; ``digest`` identifies the bundle.

    ``raw_states`` maps each state in which the client keeps raw inputs from step to step to these
    inputs, and ``kept`` has a sentence for each.
    """

    digest: str
    phases: tuple[PhaseExplanation, ...]
    raw_states: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


def explain(bundle: str | Path | PartyBundle, *, batch: int | None = None) -> Explanation:
    """Explain which tensors the client sends and receives, and how they depend on its data.

    The client's graphs are analyzed to find on which arrays each sent tensor depends.

    Args:
        bundle: the client's folder, or the client's part if it is already loaded.
        batch: the number of samples per step, which is needed for sizes in bytes if the model
            accepts any batch size.

    Raises:
        BundleError, FormatError: the folder cannot be used.
        ForbiddenGraph: a graph cannot be read, for example because it was exported for mobile apps.
        UsageError: ``bundle`` is the server's part.
    """
    party = bundle if isinstance(bundle, PartyBundle) else PartyBundle.load(bundle)
    manifest = party.manifest
    if manifest.party != CLIENT:
        raise UsageError(f"this is the {manifest.party}'s part; explain reads the client's")
    phases = tuple(
        _explain_phase(party, phase, batch)
        for phase in manifest.phases
        if phase.name != WEIGH  # the client alone computes from its labels how much they count
    )
    return Explanation(
        digest=manifest.digest,
        phases=phases,
        raw_states=manifest.raw_states,
        kept=tuple(describe_raw_states(manifest)),
    )


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
        kept=len(made - {wire.tensor.name for wire in phase.wires if wire.sender == CLIENT}),
    )


def _list_arrays(manifest: PartyManifest, phase: Phase) -> list[TensorSpec]:
    """List the arrays that the user supplies in a phase; exclude predictions to be evaluated."""
    if phase.name == SHARE:
        return []  # it sends parameters
    counts = {wire.tensor.name for wire in phase.wires if wire.kind is WireKind.COUNT}
    predicted = manifest.phase(PREDICT).results if phase.name == EVALUATE else ()
    return [spec for spec in phase.data if spec.name not in (*predicted, *counts)]


def _explain_array(
    party: PartyBundle, flow: Flow, phase: Phase, spec: TensorSpec, leaves: Sending
) -> ArrayExplanation:
    ways = []
    kept = {s.tensor.name for s in party.manifest.state if s.role is not Role.OPTIMIZER}
    is_labels = spec.name in list_labels(party.manifest)
    for tensor in leaves.tensors:
        dependence = flow.find_dependence(spec.name, tensor.wire, is_labels=is_labels)
        if dependence is not None:
            is_itself = tensor.kind in (RAW_INPUT, LABELS) and tensor.tensor == spec.name
            ways.append(Way(tensor=tensor, is_itself=is_itself, dependence=dependence))
    return ArrayExplanation(
        name=spec.name,
        kind=LABELS if is_labels else RAW_INPUT,
        declared=str(spec),
        ways=tuple(ways),
        updates=flow.count_dependent(
            spec.name, [made for name, made in phase.commits.items() if name in kept]
        ),
    )
