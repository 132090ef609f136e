"""Encode what crosses the cut of a finished bundle.

The sender's stages get nodes that encode each activation or gradient, and send the result in its
place.  The receiver gets a stage that decodes it before it is used, under the same name.  All other
graphs stay as they are, so a gradient is that at the decoded value, and passes straight through the
codec.  That the receiver decodes in a stage of its own lets it check the decoded numbers before any
other stage reads them.  What a codec computes is in the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import onnx
import onnx_ir as ir

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import UsageError
from splitonnx.manifests import (
    KEY,
    Encoded,
    Source,
    Stage,
    StageInput,
    Wire,
    WireKind,
)
from splitonnx.names import (
    ACCUMULATE,
    PORTABLE,
    PREDICT,
    STEP_PHASES,
    TRAIN,
    name_carried,
)
from splitonnx.partitioner.cutting.assemblies import write_stage
from splitonnx.partitioner.cutting.transforms.choices import make_encoding
from splitonnx.partitioner.cutting.transforms.encodings import Encoding
from splitonnx.partitioner.cutting.transforms.feedbacks import (
    add_feedback,
    declare_residual,
    leave_out_accumulating,
    make_residual,
    refuse_feedback,
)
from splitonnx.partitioner.cutting.transforms.replacements import replace_parties, replace_phase
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.random_numbers import find_key
from splitonnx.partitioner.graphs.readings import read_model
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.tensors import TensorSpec
from splitonnx.wire_codecs import Codec, CodecKind, WireCodecs

_OPSET = 18
"""The opset of the stages that decode; their operators are the same in those after it."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A wire that is encoded, and its codec.

    Only in training numbers are drawn at random, and are residuals kept.
    """

    wire: Wire
    codec: Codec
    is_training: bool

    @property
    def name(self) -> str:
        return self.wire.tensor.name

    def make_encoding(self, key: ir.Value | None) -> Encoding:
        return make_encoding(self.codec, self.name, key)

    def refuse(self) -> str:
        reason = self.make_encoding(None).refuse(self.wire.tensor)
        if reason or not self.codec.has_feedback or not self.is_training:
            return reason
        return refuse_feedback(self.wire)

    @property
    def has_feedback(self) -> bool:
        return self.is_training and self.codec.has_feedback

    @property
    def needs_key(self) -> bool:
        return self.is_training and self.codec.kind is CodecKind.RANDTOPK


@dataclass(frozen=True, kw_only=True)
class _Coded:
    """A plan with what is sent for it: the wires, in the order of the codec's pieces."""

    plan: _Plan
    wires: tuple[Wire, ...]

    def declare(self) -> Encoded:
        wire = self.plan.wire
        return Encoded(
            tensor=wire.tensor,
            sender=wire.sender,
            receiver=wire.receiver,
            kind=wire.kind,
            codec=str(self.plan.codec),
            wires=tuple(sent.tensor.name for sent in self.wires),
        )


@attribute_errors_to_pass("encoded where it crosses the cut")
def encode_crossings(bundle: Bundle, codecs: WireCodecs) -> Bundle:
    """Return a bundle whose activations and gradients are sent as ``codecs`` say.

    Only float32 is encoded, and neither inputs nor labels, outputs, losses, norms or weights.

    Raises:
        UsageError: a codec cannot encode a tensor, or no tensor would be encoded.
    """
    if codecs.is_plain:
        return bundle
    if codecs.backward.has_feedback:
        bundle = leave_out_accumulating(bundle)
    present = {phase.name for phase in bundle.client.manifest.phases}
    names = [name for name in (TRAIN, ACCUMULATE, PREDICT) if name in present]
    phases = {name: _plan_phase(bundle, name, codecs) for name in names}
    if not any(phases.values()):
        raise UsageError(
            f"--wire {codecs}: this cut sends no floats that it would encode, in the direction of "
            "a codec other than fp32; leave it out"
        )
    parties = dict(bundle.parties)
    for name, plans in phases.items():
        if plans:
            parties = _encode_phase(parties, bundle.parties, name, plans)
    recipe = msgspec.structs.replace(bundle.manifest.recipe, wire=str(codecs))
    return replace_parties(bundle, parties, recipe)


def _plan_phase(bundle: Bundle, phase: str, codecs: WireCodecs) -> dict[str, _Plan]:
    """Choose the codec of each tensor that a stage makes, and that is sent in a phase."""
    chosen = {WireKind.ACTIVATION: codecs.forward, WireKind.GRADIENT: codecs.backward}
    made = {
        (name, output)
        for name, party in bundle.parties.items()
        for stage in party.manifest.phase(phase).stages
        for output in stage.outputs
    }
    plans = {}
    for wire in bundle.client.manifest.phase(phase).wires:
        codec = chosen.get(wire.kind)
        is_made = (wire.sender, wire.tensor.name) in made
        if codec is None or codec.is_plain or wire.tensor.dtype != "F32" or not is_made:
            continue
        plan = _Plan(wire=wire, codec=codec, is_training=phase in STEP_PHASES)
        if reason := plan.refuse():
            name = wire.tensor.name.rpartition("@")[0]
            kind = "the gradient of " if wire.kind is WireKind.GRADIENT else ""
            raise UsageError(
                f"--wire: {codec} cannot encode {kind}'{name}', which is {wire.tensor}: {reason}; "
                "or choose another codec, such as fp16, or cut elsewhere"
            )
        plans[plan.name] = plan
    return plans


def _encode_phase(
    parties: Mapping[str, PartyBundle],
    plain: Mapping[str, PartyBundle],
    phase: str,
    plans: Mapping[str, _Plan],
) -> dict[str, PartyBundle]:
    """Encode the planned tensors of one phase, in the senders' stages and in the receivers'.

    Phases share graphs, so each starts from those of ``plain``, where nothing is encoded.
    """
    coded: dict[str, _Coded] = {}
    made = dict(parties)
    for name, party in made.items():
        sent = {n: plan for n, plan in plans.items() if plan.wire.sender == name}
        made[name], found = _add_encoders(party, plain[name].graphs, phase, sent)
        coded |= found
    for name, party in made.items():
        received = [one for one in coded.values() if one.plan.wire.receiver == name]
        made[name] = _declare(_add_decoders(party, phase, received), phase, coded)
    return made


def _declare(party: PartyBundle, phase: str, coded: Mapping[str, _Coded]) -> PartyBundle:
    """Replace the wires that are encoded by those that carry them."""
    part = party.manifest.phase(phase)
    wires: list[Wire] = []
    for wire in part.wires:
        one = coded.get(wire.tensor.name)
        wires += [wire] if one is None else one.wires
    order = [coded[wire.tensor.name] for wire in part.wires if wire.tensor.name in coded]
    changed = msgspec.structs.replace(
        part, wires=tuple(wires), encoded=tuple(one.declare() for one in order)
    )
    return replace_phase(party, changed, {})


def _add_encoders(
    party: PartyBundle, plain: Mapping[str, bytes], phase: str, plans: Mapping[str, _Plan]
) -> tuple[PartyBundle, dict[str, _Coded]]:
    """Add the nodes that encode to the stages that make what is sent."""
    part = party.manifest.phase(phase)
    read = {i.name for stage in part.stages for i in stage.inputs}
    kept = read | set(part.results) | set(part.commits.values())
    coded: dict[str, _Coded] = {}
    graphs: dict[str, bytes] = {}
    stages = []
    for stage in part.stages:
        own = [plans[name] for name in stage.outputs if name in plans]
        if own:
            content = graphs.get(stage.graph, plain[stage.graph])
            stage, content, found = _encode_stage(
                stage, content, own, kept, is_portable=party.manifest.target == PORTABLE
            )
            graphs[stage.graph] = content
            coded |= found
        stages.append(stage)
    changed = msgspec.structs.replace(part, stages=tuple(stages))
    fed = [one.plan.wire.tensor for one in coded.values() if one.plan.has_feedback]
    return _keep_residuals(replace_phase(party, changed, graphs), phase, fed), coded


def _keep_residuals(party: PartyBundle, phase: str, fed: Sequence[TensorSpec]) -> PartyBundle:
    """Add the residuals of gradients to a party's state, to be replaced by each step."""
    specs = [declare_residual(tensor) for tensor in fed]
    weights = {spec.tensor.name: make_residual(spec.tensor) for spec in specs}
    part = party.manifest.phase(phase)
    commits = {**part.commits, **{name: name_carried(name) for name in weights}}
    changed = replace_phase(party, msgspec.structs.replace(part, commits=commits), {})
    return replace(
        changed,
        weights={**party.weights, **weights},
        manifest=msgspec.structs.replace(changed.manifest, state=(*party.manifest.state, *specs)),
    )


def _encode_stage(
    stage: Stage, content: bytes, plans: Sequence[_Plan], kept: set[str], *, is_portable: bool
) -> tuple[Stage, bytes, dict[str, _Coded]]:
    """Have a stage encode some of its outputs, and return them no more if no one reads them.

    ``kept`` names the values that the sender's other stages read, or that are kept.
    """
    graph = read_model(onnx.load_from_string(content)).graph
    values = map_values(graph)
    coded, inputs = {}, stage.inputs
    needs_key = any(plan.needs_key for plan in plans)
    key = find_key(graph) if needs_key else None
    for plan in plans:
        value = values[plan.name]
        builder = NodeBuilder(f"{plan.name}/encoded")
        encoding = plan.make_encoding(key if plan.needs_key else None)
        if plan.has_feedback:
            fed = add_feedback(builder, value, plan.wire.tensor, encoding)
            pieces = fed.pieces
            graph.inputs.append(fed.kept)
            graph.outputs.append(fed.next)
            inputs += (StageInput(name=fed.kept.name or "", source=Source.STATE),)
        else:
            pieces = encoding.encode(builder, value, plan.wire.tensor)
        wires = []
        for piece in pieces:
            tensor = TensorSpec(
                name=f"{plan.name}#{piece.suffix}",
                dtype=piece.dtype,
                shape=piece.shape,
                bounds=piece.bounds,
            )
            wires.append(msgspec.structs.replace(plan.wire, tensor=tensor))
            _declare_value(piece.value, tensor)
        graph.extend(builder.nodes)
        graph.outputs.extend(piece.value for piece in pieces)
        coded[plan.name] = _Coded(plan=plan, wires=tuple(wires))
    dropped = {plan.name for plan in plans} - kept
    graph.outputs[:] = [value for value in graph.outputs if value.name not in dropped]
    if needs_key and all(i.name != KEY for i in inputs):
        inputs = (*inputs, StageInput(name=KEY, source=Source.SCALAR))
    changed = msgspec.structs.replace(
        stage, inputs=inputs, outputs=tuple(value.name or "" for value in graph.outputs)
    )
    return changed, write_stage(stage.name, graph, is_portable=is_portable), coded


def _declare_value(value: ir.Value, tensor: TensorSpec) -> None:
    """Set a value's name, type and shape to those of its declaration."""
    value.name = tensor.name
    value.type = ir.TensorType(_TYPES[tensor.dtype])
    value.shape = ir.Shape(tensor.shape)


_TYPES: Mapping[str, ir.DataType] = {
    "F16": ir.DataType.FLOAT16,
    "F32": ir.DataType.FLOAT,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
    "U16": ir.DataType.UINT16,
    "I32": ir.DataType.INT32,
}


def _add_decoders(party: PartyBundle, phase: str, received: Sequence[_Coded]) -> PartyBundle:
    """Add stages that decode what a party receives, each before the first stage that reads it."""
    part = party.manifest.phase(phase)
    waiting = {one.plan.name: one for one in received}
    decoded = frozenset(waiting)
    stages: list[Stage] = []
    graphs: dict[str, bytes] = {}

    def decode(label: str, coded: Sequence[_Coded]) -> None:
        graph = _build_decoder(coded)
        stage = Stage(
            name=label,
            graph=f"{label}.onnx",
            inputs=tuple(StageInput(name=v.name or "", source=Source.WIRE) for v in graph.inputs),
            outputs=tuple(value.name or "" for value in graph.outputs),
        )
        stages.append(stage)
        graphs[stage.graph] = write_stage(label, graph)

    for stage in part.stages:
        needed = [waiting.pop(i.name) for i in stage.inputs if i.name in waiting]
        if needed:
            decode(f"{stage.name}.decode", needed)
        inputs = tuple(
            msgspec.structs.replace(i, source=Source.STASH) if i.name in decoded else i
            for i in stage.inputs
        )
        stages.append(msgspec.structs.replace(stage, inputs=inputs))
    if waiting:  # no stage reads it
        decode(f"{phase}.decode", list(waiting.values()))
    return replace_phase(party, msgspec.structs.replace(part, stages=tuple(stages)), graphs)


def _build_decoder(coded: Sequence[_Coded]) -> ir.Graph:
    """Build the graph that decodes some tensors."""
    inputs, outputs, nodes = [], [], []
    for one in coded:
        pieces = []
        for wire in one.wires:
            value = ir.Value()
            _declare_value(value, wire.tensor)
            pieces.append(value)
        tensor = one.plan.wire.tensor
        builder = NodeBuilder(f"{tensor.name}/decoded")
        made = one.plan.make_encoding(None).decode(builder, pieces, tensor)
        _declare_value(made, tensor)
        inputs += pieces
        outputs.append(made)
        nodes += builder.nodes
    return ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": _OPSET}, name="decode")
