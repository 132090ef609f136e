"""Build a bundle from joint graphs: the stages and the manifest of each party.

The graphs of a party with the portable target are lowered to standard operators.  This module
writes the manifests; the modules that it calls do the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import onnx_ir as ir

from splitonnx.bundles import Bundle, PartyBundle, compute_digest
from splitonnx.losses import Loss
from splitonnx.manifests import (
    FORMAT,
    KEY,
    LEARNING_RATE,
    STEP,
    BundleManifest,
    PartyManifest,
    Phase,
    Role,
    ScoredOutput,
    Source,
    Stage,
    StageInput,
    StateSpec,
    Wire,
    WireKind,
)
from splitonnx.names import ADAPTERS, CLIENT, EVALUATE, PORTABLE, PREDICT, SERVER, TRAIN, WEIGH
from splitonnx.optimizers import Optimizer
from splitonnx.partitioner.cutting.joints import JointGraph
from splitonnx.partitioner.cutting.ports import declare, declare_end
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.cutting.safeguards import add_safeguards
from splitonnx.partitioner.cutting.stages import StageCut, cut_stages
from splitonnx.partitioner.cutting.verdicts import check_operators
from splitonnx.partitioner.differentiation.loss_arrays import NO_GRAPHS, LossGraphs
from splitonnx.partitioner.differentiation.losses import build_evaluation, list_scored
from splitonnx.partitioner.differentiation.micro_batches import (
    build_weighing,
    divide_step,
    explain_unweighable,
)
from splitonnx.partitioner.differentiation.updates import (
    Norms,
    build_norms,
    build_update,
    name_norms,
    order_norms,
)
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.readings import copy_model
from splitonnx.partitioner.graphs.transcripts import serialize
from splitonnx.partitioner.graphs.traversals import map_values, order_lazily
from splitonnx.partitioner.lowerings import lower
from splitonnx.partitioner.normalization.weights import read_array, restore_weights
from splitonnx.recipes import Recipe
from splitonnx.sharing import declare_sharing
from splitonnx.tensors import TensorSpec, name_dtype


@dataclass(frozen=True, kw_only=True)
class _Share:
    """One party's part of a phase: its entry in the manifest, and the graphs of its stages."""

    phase: Phase
    graphs: Mapping[str, bytes]
    state: tuple[StateSpec, ...] = ()
    scored: tuple[ScoredOutput, ...] = ()
    accumulators: tuple[TensorSpec, ...] = ()


@attribute_errors_to_pass("written as a bundle")
def assemble(
    prepared: PreparedModel,
    training: JointGraph,
    predict: JointGraph,
    recipe: Recipe,
    optimizer: Optimizer,
    losses: Sequence[Loss],
    graphs: LossGraphs = NO_GRAPHS,
) -> Bundle:
    """Build the bundle of a prepared model from its joint graphs for training and prediction.

    ``recipe`` holds the options of the cut, and is stored in the bundle.  ``optimizer`` updates the
    trained parameters.  ``graphs`` holds those of ``losses`` that are the user's own.
    """
    targets = {CLIENT: recipe.client_target}
    if recipe.at:
        targets[SERVER] = recipe.server_target
    own = _list_own(training)
    is_private = bool(recipe.tail_at and own.get(SERVER))
    obstacle = explain_unweighable(losses, is_private=is_private)
    client = [_share_evaluation(prepared, predict, losses, graphs)]
    if not obstacle:
        phase, graph = build_weighing(losses, training.data)
        client.append(_Share(phase=phase, graphs={f"{WEIGH}.onnx": write_stage(WEIGH, graph)}))
    stages = {name: _cut_phase(joint) for name, joint in ((TRAIN, training), (PREDICT, predict))}
    parties = {}
    for party, target in targets.items():
        portable = target == PORTABLE
        trained = _share_training(training, stages[TRAIN], party, portable, optimizer)
        shares = [
            trained,
            _share_phase(PREDICT, predict, stages[PREDICT], party, portable),
            *(client if party == CLIENT else []),
            *([] if obstacle else _share_accumulating(trained, training, party)),
        ]
        owners = [graph.owners for graph in (training, predict)]
        weights = {
            name: read_array(tensor)
            for name, tensor in prepared.weights.items()
            if any(party in owner.get(name, ()) for owner in owners)
        }
        made = _build_party(prepared, training, party, target, shares, weights, optimizer)
        parties[party] = _refuse_accumulating(made, obstacle) if party == CLIENT else made
    shared = declare_sharing({n: p.manifest for n, p in parties.items()}, prepared.carried)
    parties = {name: replace(parties[name], manifest=manifest) for name, manifest in shared.items()}
    digest = compute_digest(parties)
    skeleton = _keep_orphans(prepared, parties)
    note = prepared.skeleton.metadata_props.get(ADAPTERS)
    return Bundle(
        manifest=BundleManifest(
            format=FORMAT, digest=digest, recipe=recipe, parties=tuple(parties)
        ),
        parties={name: _sign(party, digest) for name, party in parties.items()},
        skeleton=serialize(skeleton, {node.domain for node in skeleton.all_nodes()}, note),
    )


def _keep_orphans(prepared: PreparedModel, parties: Mapping[str, PartyBundle]) -> ir.Graph:
    """Return the skeleton's graph, and store in it the weights that neither party uses.

    These weights only affect outputs that do not depend on any input.  They are stored in a copy.
    """
    owned = {name for party in parties.values() for name in party.weights}
    orphans = {n: read_array(w) for n, w in prepared.weights.items() if n not in owned}
    if not orphans:
        return prepared.skeleton.graph
    skeleton = copy_model(prepared.skeleton).graph
    restore_weights(skeleton, orphans)
    return skeleton


def _sign(party: PartyBundle, digest: str) -> PartyBundle:
    return replace(party, manifest=msgspec.structs.replace(party.manifest, digest=digest))


def _refuse_accumulating(party: PartyBundle, obstacle: str) -> PartyBundle:
    return replace(party, manifest=msgspec.structs.replace(party.manifest, unweighable=obstacle))


def _build_party(
    prepared: PreparedModel,
    training: JointGraph,
    party: str,
    target: str,
    shares: Sequence[_Share],
    weights: Mapping[str, np.ndarray],
    optimizer: Optimizer,
) -> PartyBundle:
    graphs = {file: graph for share in shares for file, graph in share.graphs.items()}
    declared = tuple(
        StateSpec(
            tensor=TensorSpec(name=name, dtype=name_dtype(array.dtype), shape=array.shape),
            role=_find_role(prepared, training, name),
        )
        for name, array in weights.items()
    )
    outputs = prepared.inference.graph.outputs if party == CLIENT else ()
    manifest = PartyManifest(
        format=FORMAT,
        party=party,
        digest="",
        target=target,
        phases=tuple(share.phase for share in shares),
        state=(*declared, *(spec for share in shares for spec in share.state)),
        files={file: hashlib.sha256(graph).hexdigest() for file, graph in graphs.items()},
        learning_rate=optimizer.lr,
        outputs=tuple(declare_end(v, "output") for v in outputs),
        scored=tuple(output for share in shares for output in share.scored),
        tells_labels=tuple(
            w.tensor.name for w in training.wires if w.tells_labels or w.tells_inputs
        ),
        raw_states={n: tuple(sorted(r)) for n, r in training.held.items() if r and n in weights},
        remote_states=tuple(n for n in prepared.carried if party == CLIENT and n not in weights),
        accumulators=tuple(spec for share in shares for spec in share.accumulators),
    )
    return PartyBundle(manifest=manifest, graphs=graphs, weights=weights)


def _find_role(prepared: PreparedModel, training: JointGraph, name: str) -> Role:
    """Return a parameter's role; a parameter that the loss does not depend on is frozen."""
    role = prepared.roles[name]
    kept = {Role.PARAMETER: training.gradients, Role.BUFFER: training.commits}.get(role)
    return role if kept is None or name in kept else Role.FROZEN


def _cut_phase(joint: JointGraph) -> list[StageCut]:
    """Split a phase's joint graph into the stages of all parties."""
    return cut_stages(joint.graph, [wire.crossing for wire in joint.wires], joint.targets)


def _share_phase(
    name: str, joint: JointGraph, every: Sequence[StageCut], party: str, portable: bool
) -> _Share:
    """Describe one party's stages of a phase, and write their graphs."""
    cuts = [cut for cut in every if cut.party == party]
    stages, graphs = [], {}
    for index, cut in enumerate(cuts):
        label = _name_stage(name, joint, party, cuts, index)
        stages.append(_describe_stage(label, cut, joint, party))
        graph = cut.extract()
        if portable:
            lower(graph)
        order_lazily(graph)
        graphs[f"{label}.onnx"] = write_stage(label, graph, is_portable=portable)
    results = joint.results if party == CLIENT else ()
    used = {i.name for stage in stages for i in stage.inputs if i.source is Source.DATA}
    used.update(results)  # an input of the model may be an output, too
    phase = Phase(
        name=name,
        stages=tuple(stages),
        data=tuple(spec for data, spec in joint.data.items() if data in used),
        wires=tuple(
            Wire(
                tensor=wire.tensor,
                sender=wire.crossing.sender,
                receiver=wire.crossing.receiver,
                kind=wire.kind,
            )
            for wire in joint.wires
        ),
        results=results,
        commits={n: v for n, v in joint.commits.items() if party in joint.owners[n]},
    )
    return _Share(phase=phase, graphs=graphs)


def _describe_stage(label: str, cut: StageCut, joint: JointGraph, party: str) -> Stage:
    received = {w.tensor.name for w in joint.wires if w.crossing.receiver == party}

    def find_source(name: str) -> Source:
        if name in received:
            return Source.WIRE
        if name in (KEY, LEARNING_RATE, STEP):
            return Source.SCALAR
        if name in joint.owners:
            return Source.STATE
        return Source.DATA if name in joint.data else Source.STASH

    inputs = tuple(StageInput(name=name, source=find_source(name)) for name in cut.inputs)
    return Stage(name=label, graph=f"{label}.onnx", inputs=inputs, outputs=cut.outputs)


def _name_stage(
    phase: str, joint: JointGraph, party: str, cuts: Sequence[StageCut], index: int
) -> str:
    """Name a stage by its part and direction: head.forward, body.step, tail.predict, ..."""
    reporting = bool(set(cuts[index].outputs) & set(joint.results))
    if party == SERVER:
        part = "body"
    elif not joint.wires:
        part = "model"
    else:
        part = "tail" if reporting and index > 0 else "head"
    if phase == PREDICT:
        return f"{part}.predict"
    if reporting:
        return f"{part}.step"
    return f"{part}.forward" if index == 0 else f"{part}.backward"


def _share_training(
    joint: JointGraph,
    every: Sequence[StageCut],
    party: str,
    portable: bool,
    optimizer: Optimizer,
) -> _Share:
    """Build a party's training stages: its gradients first, then the update of its parameters."""
    share = _share_phase(TRAIN, joint, every, party, portable)
    own = _list_own(joint)
    if not own[party]:
        return share
    stages, graphs = list(share.phase.stages), dict(share.graphs)
    norms = None
    wires = share.phase.wires
    if optimizer.clip_norm is not None:
        norms = order_norms(own, joint.gradients)
        vector = name_norms(party)
        _append(stages, graphs, "norms", build_norms(own[party], joint.gradients, vector), {})
        if len(norms.sizes) > 1:
            wires += tuple(_describe_norms(n, norms, own) for n in own if own[n])
    update = build_update(own[party], joint.gradients, optimizer, norms, portable=portable)
    sources = {spec.tensor.name: Source.STATE for spec in update.state}
    sources |= {spec.name: Source.STATE for spec in own[party]}
    sources |= {LEARNING_RATE: Source.SCALAR, STEP: Source.SCALAR}
    sources |= {name_norms(name): Source.WIRE for name in own if name != party}
    _append(stages, graphs, "update", update.graph, sources)
    phase = msgspec.structs.replace(
        share.phase,
        stages=tuple(stages),
        wires=wires,
        commits={**share.phase.commits, **update.commits},
    )
    return _Share(phase=phase, graphs=graphs, state=update.state)


def _list_own(joint: JointGraph) -> dict[str, list[TensorSpec]]:
    """List the parameters that each party updates."""
    inputs = map_values(joint.graph)
    return {
        name: [declare(inputs[p]) for p in joint.gradients if name in joint.owners[p]]
        for name in joint.targets
    }


def _share_accumulating(trained: _Share, joint: JointGraph, party: str) -> list[_Share]:
    """Build a party's phases for steps of several micro-batches from its phase of training."""
    made = divide_step(trained.phase, _list_own(joint), joint.gradients, party)
    graphs = {f"{name}.onnx": write_stage(name, graph) for name, graph in made.graphs.items()}
    adding, updating = made.phases
    return [
        _Share(phase=adding, graphs=graphs, accumulators=made.accumulators),
        _Share(phase=updating, graphs={}),
    ]


def _append(
    stages: list[Stage],
    graphs: dict[str, bytes],
    name: str,
    graph: ir.Graph,
    sources: Mapping[str, Source],
) -> None:
    """Append a stage to ``stages``, and its graph to ``graphs``.

    Inputs that ``sources`` does not list are read from the stash.
    """
    names = [value.name or "" for value in graph.inputs]
    stages.append(
        Stage(
            name=name,
            graph=f"{name}.onnx",
            inputs=tuple(StageInput(name=n, source=sources.get(n, Source.STASH)) for n in names),
            outputs=tuple(value.name or "" for value in graph.outputs),
        )
    )
    graphs[f"{name}.onnx"] = write_stage(name, graph)


def _describe_norms(party: str, norms: Norms, own: Mapping[str, Sequence[TensorSpec]]) -> Wire:
    name = name_norms(party)
    other = next(known for known in own if known != party)
    tensor = TensorSpec(name=name, dtype="F32", shape=(norms.sizes[name],))
    return Wire(tensor=tensor, sender=party, receiver=other, kind=WireKind.NORM)


def _share_evaluation(
    prepared: PreparedModel, predict: JointGraph, losses: Sequence[Loss], graphs: LossGraphs
) -> _Share:
    """Build the client's stage that computes the losses and metrics of a prediction."""
    inferred, trained = prepared.inference.graph, prepared.training.graph
    model, outputs, attached = build_evaluation(inferred, trained, losses, graphs, predict.scores)
    add_safeguards(model.graph, attached.nodes, is_training=False)
    lower(model.graph)
    label, scored = EVALUATE, list_scored(inferred, trained, losses, predict.scores)
    data = (*map(declare, outputs), *attached.data.values())
    stage = Stage(
        name=label,
        graph=f"{label}.onnx",
        inputs=tuple(StageInput(name=spec.name, source=Source.DATA) for spec in data),
        outputs=attached.results,
    )
    phase = Phase(name=EVALUATE, stages=(stage,), data=data, results=attached.results)
    graphs_by_file = {stage.graph: write_stage(label, model.graph)}
    return _Share(phase=phase, graphs=graphs_by_file, scored=scored)


def write_stage(name: str, graph: ir.Graph | ir.GraphView, *, is_portable: bool = True) -> bytes:
    """Serialize a stage's graph after checking that the runtime knows its operators."""
    return serialize(graph, check_operators(name, graph, is_portable=is_portable))
