"""Build joint graphs: one graph per phase, with both parties' nodes and the tensors they exchange.

``build_training`` builds a graph with the forward and backward pass; ``build_predict`` builds the
forward graph for inference.  :mod:`stages` then splits both in the same way.  This module also
determines which party computes each gradient.  It depends neither on files nor on the target
runtime.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from splitonnx.errors import NotACut, UsageError
from splitonnx.losses import FROM_MODEL, Loss
from splitonnx.manifests import WireKind
from splitonnx.names import CLIENT, LOSS, SERVER
from splitonnx.partitioner.cutting.carried_states.placements import place_states
from splitonnx.partitioner.cutting.carried_states.raw_inputs import trace_held_inputs
from splitonnx.partitioner.cutting.divisions import divide_inference, divide_training
from splitonnx.partitioner.cutting.ports import Port, declare, declare_end, insert_ports
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.cutting.safeguards import add_safeguards
from splitonnx.partitioner.cutting.stages import Crossing, WireSpec
from splitonnx.partitioner.differentiation.activations.final_activations import (
    CONTAINED,
    describe_inverted,
    skip_activation,
)
from splitonnx.partitioner.differentiation.activations.predicted_scores import predict_scores
from splitonnx.partitioner.differentiation.derived.supplied_gradients import GRADIENT
from splitonnx.partitioner.differentiation.gradients import differentiate
from splitonnx.partitioner.differentiation.label_traces import trace_labels
from splitonnx.partitioner.differentiation.loss_arrays import (
    NO_GRAPHS,
    LossGraphs,
    find_class_axis,
    list_reads,
)
from splitonnx.partitioner.differentiation.losses import attach_losses
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.readings import copy_model
from splitonnx.partitioner.graphs.traversals import (
    find_movers,
    map_values,
    prune,
    walk_back,
)
from splitonnx.partitioner.lowerings import lower
from splitonnx.partitioner.lowerings.centred_normalizations import centre_normalizations
from splitonnx.partitioner.lowerings.fusions import prevent_wrong_fusions
from splitonnx.partitioner.lowerings.kernels.choices import choose_kernels
from splitonnx.partitioner.normalization.batchnorms import trace_statistic
from splitonnx.tensors import TensorSpec

_log = logging.getLogger(__name__)

NOTHING_TO_TRAIN = "nothing is left to train: the loss depends on no trainable parameter"
"""The message of the error for a model without a trained parameter before the loss."""


@dataclass(frozen=True, kw_only=True)
class JointGraph:
    """The joint graph of a phase, with its wires and the values that each party must compute.

    ``wires`` are the tensors that the parties exchange.  ``targets`` maps each party to the values
    that it must compute besides the tensors that it sends.  ``results`` names the values returned
    to the client's caller.  ``data`` declares the arrays that the caller must supply.  ``owners``
    maps each weight to the parties that use it in this phase.  ``gradients`` maps each trained
    parameter to the name of its gradient, in the model's order.  ``commits`` maps each running
    statistic, and each state that is carried from step to step, to the value that replaces it.
    ``held`` maps each carried state to the raw inputs of earlier steps that it holds.  ``scores``
    maps outputs to the results that hold the scores before their last activation.
    """

    graph: ir.Graph
    wires: tuple[WireSpec, ...]
    targets: Mapping[str, Sequence[ir.Value]]
    results: tuple[str, ...]
    data: Mapping[str, TensorSpec]
    owners: Mapping[str, frozenset[str]]
    gradients: Mapping[str, str] = field(default_factory=dict)
    commits: Mapping[str, str] = field(default_factory=dict)
    held: Mapping[str, frozenset[str]] = field(default_factory=dict)
    scores: Mapping[str, str] = field(default_factory=dict)


@attribute_errors_to_pass("differentiated")
def build_training(
    prepared: PreparedModel,
    at: Sequence[str],
    tail_at: Sequence[str],
    losses: Sequence[Loss],
    examine: Callable[[JointGraph], None] | None = None,
    graphs: LossGraphs = NO_GRAPHS,
) -> JointGraph:
    """Build the joint graph of training: add the losses and the ports, then differentiate.

    ``examine`` is called with the graph before gradients and targets are added.  It can raise an
    exception to refuse the cut before the slow differentiation.

    Ports mark the tensors that the parties exchange (:mod:`ports`).  ``at`` and ``tail_at`` name
    the tensors of the cut.  Each of ``losses`` names its output, and ``graphs`` holds those from
    files.  Nodes that only other outputs need are left out.
    """
    model = copy_model(prepared.training)
    graph = model.graph
    outputs = [name for loss in losses for name in list_reads(loss, graphs)]
    divided = divide_training(prepared, graph, at, tail_at, outputs)
    placed = place_states(prepared, graph, divided)
    partition = placed.partition
    crossing = {*partition.at, *partition.tail_at}
    axes = [find_class_axis(graph, loss, graphs) for loss in losses]
    scores = [
        skip_activation(graph, loss.kind, loss.output or "", crossing, axis)
        for loss, axis in zip(losses, axes, strict=True)
    ]
    known = set(graph)
    attached = attach_losses(graph, losses, scores, graphs)
    graph.outputs[:] = [value for value in graph.outputs if value.name in attached.results]
    reports = SERVER if partition.at and not partition.tail_at else CLIENT
    server = set(partition.server) | (set(graph) - known if reports == SERVER else set())
    ports = insert_ports(graph, partition, server, attached.data)
    guarded = {*known, *attached.nodes}  # the labels of all other losses have bounds
    add_safeguards(graph, guarded, is_training=True)
    values = map_values(graph)
    graph.outputs.extend(values[name] for name in placed.commits.values())
    statistics = _keep_statistics(prepared, graph)
    commits = {**statistics, **placed.commits}
    prune(graph)

    data = _declare_data(prepared, graph, attached.data)
    needed = map_values(graph)  # a tensor that the loss does not need is sent only for prediction
    port_wires = [(port, declare(port.value)) for port in ports if port.value.name in needed]
    if examine is not None:
        wires = _list_port_wires(graph, port_wires, attached.data)
        weights = dict.fromkeys(prepared.weights, frozenset[str]())
        examine(
            JointGraph(
                graph=graph,
                wires=tuple(wires),
                targets={},
                results=(),
                data=data,
                owners=weights,
                commits=commits,
                held=trace_held_inputs(graph, data, prepared, placed.commits),
            )
        )
    derived = differentiate(model, _find_trained(prepared, graph), LOSS).graph
    choose_kernels(derived)
    lower(derived, defective=True)
    prevent_wrong_fusions(derived, is_valid=True)  # of Pads without axes, and of gradients
    centre_normalizations(derived)
    gradients = _match_gradients(prepared, derived)
    wires = [
        *_list_port_wires(derived, port_wires, attached.data),
        *_list_gradients(derived, port_wires),
    ]
    made = map_values(derived)
    if reports == SERVER:
        wires += [
            WireSpec(
                crossing=Crossing(value=made[name], sender=SERVER, receiver=CLIENT),
                tensor=TensorSpec(name=name, dtype="F32", shape=()),
                kind=WireKind.REPORT,
            )
            for name in attached.results
        ]
    targets: dict[str, list[ir.Value]] = {CLIENT: [], SERVER: []}
    targets[reports] += [made[name] for name in attached.results]
    for name, party in placed.owners.items():
        targets[party].append(made[placed.commits[name]])
    owners = _trace_owners(prepared, wires, targets)
    has_own_loss = any(loss.kind == FROM_MODEL for loss in losses)
    inputs = _list_tail_inputs(wires, data) if has_own_loss else set()
    for name, value in {**gradients, **statistics}.items():
        for party in owners[name]:
            targets[party].append(made[value])
    return JointGraph(
        graph=derived,
        wires=tuple(_mark_telling(wires, derived, attached.data, inputs, owners, prepared)),
        targets={party: values for party, values in targets.items() if partition.at or values},
        results=attached.results,
        data=data,
        owners=owners,
        gradients=gradients,
        commits=commits,
        held=trace_held_inputs(derived, data, prepared, placed.commits),
    )


@attribute_errors_to_pass("divided for prediction")
def build_predict(
    prepared: PreparedModel,
    at: Sequence[str],
    tail_at: Sequence[str],
    losses: Sequence[Loss] = (),
) -> JointGraph:
    """Build the joint graph for prediction: the model in inference mode, with ports added.

    Ports mark the tensors that the parties exchange (:mod:`ports`).  ``at`` names the tensors that
    the client sends, and ``tail_at`` those that the server sends back in a U-shaped cut.  The
    server also sends the client the outputs that it computes.

    Where one of ``losses`` skips the model's last activation, the scores before it are a result,
    too, so that an evaluation computes the loss from them.
    """
    trained = prepared.training.graph
    scored = [
        (loss.kind, loss.output or "", find_class_axis(trained, loss))
        for loss in losses
        if loss.kind in CONTAINED
    ]
    graph = copy_model(prepared.inference).graph
    scores = predict_scores(graph, trained, scored)
    try:
        return _build_predict(prepared, graph, at, tail_at, scores)
    except NotACut:
        if not scores:
            raise
    made = _build_predict(prepared, copy_model(prepared.inference).graph, at, tail_at, {})
    for kind, output, _ in scored:
        if output in scores:
            _log.warning("%s", describe_inverted("evaluate", kind, output))
    return made


def _build_predict(
    prepared: PreparedModel,
    graph: ir.Graph,
    at: Sequence[str],
    tail_at: Sequence[str],
    scores: Mapping[str, str],
) -> JointGraph:
    partition = divide_inference(prepared, graph, at, tail_at)
    ports = insert_ports(graph, partition, partition.server)
    add_safeguards(graph, set(graph), is_training=False)
    prune(graph)
    centre_normalizations(graph)
    wires = list(_list_port_wires(graph, [(port, declare(port.value)) for port in ports], {}))
    away = [v for v in graph.outputs if v.producer() in partition.server]
    wires += [
        WireSpec(
            crossing=Crossing(value=value, sender=SERVER, receiver=CLIENT),
            tensor=declare_end(value, "output"),
            kind=WireKind.OUTPUT,
        )
        for value in away
    ]
    names = tuple(value.name or "" for value in graph.outputs)
    at_home = [value for value in graph.outputs if value not in away]
    targets = {CLIENT: at_home, SERVER: away} if partition.at else {CLIENT: at_home}
    return JointGraph(
        graph=graph,
        wires=tuple(wires),
        targets=targets,
        results=names,
        data=_declare_data(prepared, graph, {}),
        owners=_trace_owners(prepared, wires, targets),
        scores=scores,
    )


def _find_trained(prepared: PreparedModel, graph: ir.Graph) -> list[str]:
    loss = [value for value in graph.outputs if value.name == LOSS]
    reached = {value.name for value in find_movers(loss)}
    trained = [name for name in prepared.trainable if name in reached]
    if not trained:
        raise UsageError(NOTHING_TO_TRAIN)
    return trained


def _keep_statistics(prepared: PreparedModel, graph: ir.Graph) -> dict[str, str]:
    """Add the new running statistics to the graph's outputs, and map each statistic to its output.

    Statistics of nodes that the loss does not depend on are left out.
    """
    needed, _ = walk_back(graph.outputs)
    values = map_values(graph)
    traced = {n: trace_statistic(values[v], needed) for n, v in prepared.next_buffers.items()}
    kept = {name: value for name, value in traced.items() if value is not None}
    graph.outputs.extend(kept.values())
    return {name: value.name or "" for name, value in kept.items()}


def _match_gradients(prepared: PreparedModel, derived: ir.Graph) -> dict[str, str]:
    made = {value.name for value in derived.outputs}
    names = {name: f"{name}{GRADIENT}" for name in prepared.trainable}
    return {name: gradient for name, gradient in names.items() if gradient in made}


def _declare_data(
    prepared: PreparedModel, graph: ir.Graph, arrays: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    raw = [v for v in graph.inputs if v.name not in prepared.state]
    return {v.name or "": arrays.get(v.name or "") or declare_end(v, "input") for v in raw}


def _list_port_wires(
    graph: ir.Graph, ports: Sequence[tuple[Port, TensorSpec]], arrays: Mapping[str, TensorSpec]
) -> list[WireSpec]:
    values = map_values(graph)
    wires = []
    for port, tensor in ports:
        array = arrays.get(tensor.name.rpartition("@")[0]) if port.kind is WireKind.INPUT else None
        if array is not None:
            tensor = TensorSpec(
                name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, bounds=array.bounds
            )
        crossing = Crossing(value=values[tensor.name], sender=port.sender, receiver=port.receiver)
        wires.append(WireSpec(crossing=crossing, tensor=tensor, kind=port.kind))
    return wires


def _list_gradients(graph: ir.Graph, ports: Sequence[tuple[Port, TensorSpec]]) -> list[WireSpec]:
    """List the gradients that are sent back: one for each port whose gradient was computed.

    A gradient is declared with the shape of its forward value, so that both have the same size.
    """
    values = map_values(graph)
    wires = []
    for port, tensor in ports:
        value = values.get(f"{tensor.name}{GRADIENT}")
        if value is not None:
            wires.append(
                WireSpec(
                    crossing=Crossing(value=value, sender=port.receiver, receiver=port.sender),
                    tensor=TensorSpec(
                        name=value.name or "", dtype=tensor.dtype, shape=tensor.shape
                    ),
                    kind=WireKind.GRADIENT,
                )
            )
    return wires


def _list_tail_inputs(wires: Sequence[WireSpec], data: Collection[str]) -> set[str]:
    """Return the names of the data that nothing depends on which the server sends back.

    In a model with a loss of its own, these are what this loss compares with: labels.
    """
    back = [w.crossing.value for w in wires if w.crossing.sender == SERVER]
    _, read = walk_back([v for v in back if not (v.name or "").endswith(GRADIENT)])
    return set(data) - {value.name for value in read}


def _mark_telling(
    wires: Sequence[WireSpec],
    graph: ir.Graph,
    labels: Collection[str],
    inputs: Collection[str],
    owners: Mapping[str, frozenset[str]],
    prepared: PreparedModel,
) -> Iterator[WireSpec]:
    """Yield all wires, with those marked that are gradients and tell the server the labels.

    ``labels`` names all arrays that the losses read, and ``inputs`` those that a loss within the
    model reads.
    """
    client = {name for name, parties in owners.items() if parties == {CLIENT}}
    own = client & prepared.gradient_layers
    told, own_told = (
        trace_labels(graph, names, own, prepared.gradient_scalings) for names in (labels, inputs)
    )
    for wire in wires:
        is_sent = wire.kind is WireKind.GRADIENT and wire.crossing.sender == CLIENT
        value = wire.crossing.value
        yield replace(
            wire,
            tells_labels=is_sent and value in told,
            tells_inputs=is_sent and value in own_told,
        )


def _trace_owners(
    prepared: PreparedModel,
    wires: Sequence[WireSpec],
    targets: Mapping[str, Sequence[ir.Value]],
) -> dict[str, frozenset[str]]:
    """Map each weight to the parties that use it in the forward pass."""
    owners: dict[str, frozenset[str]] = {}
    for party, values in targets.items():
        stop = {w.crossing.value for w in wires if w.crossing.receiver == party}
        sent = [
            w.crossing.value
            for w in wires
            if w.crossing.sender == party and w.kind is not WireKind.GRADIENT
        ]
        for source in walk_back([*values, *sent], stop=stop)[1]:
            name = source.name or ""
            if name in prepared.weights:
                owners[name] = owners.get(name, frozenset()) | {party}
    return owners
