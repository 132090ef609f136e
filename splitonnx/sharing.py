"""The phase in which clients share parameters, so that what many clients learn is joined.

A client sends its trained parameters and its running statistics, and the server answers with the
joined ones.  The phase has no stages, because the server's policy computes what is joined.  A
client takes part only if its user permits it and the policy needs it.  This module declares the
phase; it neither sends nor averages anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from splitonnx.manifests import PartyManifest, Phase, Role, Wire, WireKind
from splitonnx.names import CLIENT, JOINED, OWN, SERVER, SHARE
from splitonnx.tensors import TensorSpec

SAMPLES = "splitonnx.samples"
"""The name of a wire, I64[]: the number of samples that the client trained with since it last
shared; 0 if it only asks for the joined parameters."""
LEAVES = "splitonnx.leaves"
"""The name of a wire, I64[]: 1 if the client shares nothing after this, otherwise 0."""
ROUND = "splitonnx.round"
"""The name of a wire, I64[]: the number of the round whose joined parameters are sent."""

_FLOATS = ("F16", "BF16", "F32", "F64")
_COUNTS = {SAMPLES: CLIENT, LEAVES: CLIENT, ROUND: SERVER}


def name_own(state: str) -> str:
    """Return the name of the wire with a client's own value of a state tensor."""
    return f"{state}{OWN}"


def name_joined(state: str) -> str:
    """Return the name of the value that replaces a state tensor when parameters are joined."""
    return f"{state}{JOINED}"


def declare_sharing(
    manifests: Mapping[str, PartyManifest], carried: Collection[str]
) -> dict[str, PartyManifest]:
    """Add the phase to the manifests of a split model's parties; an unsplit model has none.

    What is joined is a party's floats that training changes.  The optimizer's state is not, and
    neither are the states ``carried`` that the model hands itself from step to step, because they
    are computed from a client's own data.
    """
    if SERVER not in manifests:
        return dict(manifests)
    joined = {name: _list_shareable(party, carried) for name, party in manifests.items()}
    return {
        name: msgspec.structs.replace(
            party, phases=(*party.phases, _declare_phase(name, joined[CLIENT], joined[name]))
        )
        for name, party in manifests.items()
    }


def list_joined(manifest: PartyManifest) -> tuple[str, ...]:
    """List the tensors of a party's state that are joined; none in bundles of earlier versions."""
    return tuple(manifest.phase(SHARE).commits)


def list_carried(manifest: PartyManifest) -> tuple[str, ...]:
    """List the states that a party's part hands itself from step to step.

    They are computed from the data of whoever trained or predicted last.
    """
    joined = set(list_joined(manifest))
    buffers = [spec.tensor.name for spec in manifest.state if spec.role is Role.BUFFER]
    return tuple(name for name in buffers if name not in joined)


def _list_shareable(manifest: PartyManifest, carried: Collection[str]) -> tuple[TensorSpec, ...]:
    return tuple(
        spec.tensor
        for spec in manifest.state
        if spec.role in (Role.PARAMETER, Role.BUFFER)
        and spec.tensor.dtype in _FLOATS
        and spec.tensor.name not in carried
    )


def _declare_phase(party: str, sent: Sequence[TensorSpec], joined: Sequence[TensorSpec]) -> Phase:
    """Declare one party's part of the phase.

    ``sent`` are the tensors of the client's state that are joined, and ``joined`` are those of the
    state of ``party``.
    """
    wires = [_declare_count(name) for name in (SAMPLES, LEAVES)]
    wires += [_declare_wire(name_own(spec.name), spec, CLIENT) for spec in sent]
    wires += [_declare_count(ROUND)]
    wires += [_declare_wire(name_joined(spec.name), spec, SERVER) for spec in sent]
    data = {wire.tensor.name: wire.tensor for wire in wires if wire.sender == party}
    if party == SERVER:
        data |= {name_joined(s.name): _rename(s, name_joined(s.name)) for s in joined}
    return Phase(
        name=SHARE,
        data=tuple(data.values()),
        wires=tuple(wires),
        results=(ROUND,) if party == CLIENT else (),
        commits={spec.name: name_joined(spec.name) for spec in joined},
    )


def _declare_count(name: str) -> Wire:
    return _declare_wire(name, TensorSpec(name=name, dtype="I64", shape=()), _COUNTS[name])


def _declare_wire(name: str, spec: TensorSpec, sender: str) -> Wire:
    return Wire(
        tensor=_rename(spec, name),
        sender=sender,
        receiver=SERVER if sender == CLIENT else CLIENT,
        kind=WireKind.PARAMETER,
    )


def _rename(spec: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name=name, dtype=spec.dtype, shape=spec.shape)
