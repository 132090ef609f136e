"""Error feedback: what a codec leaves out of a gradient is added to the gradient of the next step.

With the residual ``r`` of the step before, which starts at zeros, the sender encodes ``g + r`` in
place of ``g``, and keeps ``g + r - decoded(g + r)``.  The residual is a state of the sender, which
commits it with the step.  It has the gradient's shape, so that must be known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec
import numpy as np
import onnx_ir as ir

from splitonnx.bundles import Bundle
from splitonnx.manifests import Role, StateSpec, Wire, WireKind
from splitonnx.names import ACCUMULATE, CLIENT, UPDATE, WEIGH, name_carried
from splitonnx.partitioner.cutting.transforms.encodings import Encoding, Piece
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.tensors import TensorSpec

_SHARED_RESIDUAL = (
    "its codec keeps what it left out for the next step (+ef), and micro-batches of different rows "
    "would share that; cut the model with a codec without +ef"
)


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """A residual in the sender's graph: the ``kept`` input, and the output that replaces it."""

    kept: ir.Value
    next: ir.Value
    pieces: list[Piece]


def refuse_feedback(wire: Wire) -> str:
    """Return why there is no error feedback for a tensor, or an empty string."""
    if wire.kind is not WireKind.GRADIENT:
        return "error feedback (+ef) is for gradients, which add up; leave it out of fwd"
    unknown = [str(dim) for dim in wire.tensor.shape if not isinstance(dim, int)]
    if unknown:
        return (
            f"its size '{unknown[0]}' is not known beforehand, and error feedback (+ef) keeps a "
            "tensor of its shape from step to step; fix it with --dim, as --dim N=32 the batch"
        )
    return ""


def declare_residual(tensor: TensorSpec) -> StateSpec:
    """Declare the state that holds the residual of a gradient."""
    spec = TensorSpec(name=f"{tensor.name}#residual", dtype="F32", shape=tensor.shape)
    return StateSpec(tensor=spec, role=Role.BUFFER)


def make_residual(tensor: TensorSpec) -> np.ndarray:
    """Return the residual before the first step."""
    return np.zeros([dim for dim in tensor.shape if isinstance(dim, int)], np.float32)


def add_feedback(
    builder: NodeBuilder, value: ir.Value, tensor: TensorSpec, encoding: Encoding
) -> Feedback:
    """Build the pieces of a gradient and its residual, and what replaces the residual."""
    name = declare_residual(tensor).tensor.name
    kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(tensor.shape)
    kept = ir.Value(name=name, type=kind, shape=shape)
    summed = builder.op("Add", value, kept)
    pieces = encoding.encode(builder, summed, tensor)
    decoded = encoding.decode(builder, [piece.value for piece in pieces], tensor)
    left = builder.op("Sub", summed, decoded)
    left.name, left.type, left.shape = name_carried(name), kind, shape
    return Feedback(kept=kept, next=left, pieces=pieces)


def leave_out_accumulating(bundle: Bundle) -> Bundle:
    """Leave out the phases for steps of several micro-batches, which would share one residual."""
    parties = {}
    for name, party in bundle.parties.items():
        manifest = party.manifest
        phases = tuple(p for p in manifest.phases if p.name not in (ACCUMULATE, UPDATE, WEIGH))
        used = {stage.graph for phase in phases for stage in phase.stages}
        graphs = {file: graph for file, graph in party.graphs.items() if file in used}
        changed = msgspec.structs.replace(
            manifest,
            phases=phases,
            accumulators=(),
            files={
                n: sha for n, sha in manifest.files.items() if n in used or n not in party.graphs
            },
            unweighable=(manifest.unweighable or _SHARED_RESIDUAL) if name == CLIENT else "",
        )
        parties[name] = replace(party, manifest=changed, graphs=graphs)
    return replace(bundle, parties=parties)
