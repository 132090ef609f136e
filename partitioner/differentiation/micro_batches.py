"""Build what a step of several micro-batches needs beside the stages of an ordinary step.

The stages that compute gradients and those that update are the same as in the phase ``train``, and
their graphs are shared with it.  New are small graphs of standard operators: one adds a
micro-batch's gradients, each multiplied by the micro-batch's weight, to the sums so far, and one
hands the sums to the update as its gradients.  What a micro-batch counts in the loss is computed by
a graph of its own, from the labels alone.  This module knows manifests and losses, but no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from splitonnx.losses import FROM_FILE, FROM_MODEL, Loss
from splitonnx.manifests import Phase, Source, Stage, StageInput, Wire, WireKind
from splitonnx.micro_batches import CONFIRMED, MICRO_BATCH_WEIGHT, MICRO_BATCHES
from splitonnx.names import ACCUMULATE, CLIENT, COUNTED, LOSS, SERVER, UPDATE, WEIGH, WEIGHT
from splitonnx.partitioner.differentiation.loss_formulas import count_labels
from splitonnx.partitioner.differentiation.updates import NEXT, InputGraph
from splitonnx.tensors import TensorSpec

SUM = "#gradient"
"""Suffix of the sum of a parameter's gradients."""
_GRADIENTS, _CONFIRM = "gradients", "confirm"
_WEIGHT = TensorSpec(name=MICRO_BATCH_WEIGHT, dtype="F32", shape=(), bounds=(0, 2))
_COUNT = TensorSpec(name=MICRO_BATCHES, dtype="I64", shape=())


@dataclass(frozen=True, kw_only=True)
class AccumulatingPhases:
    """The phases ``accumulate`` and ``update`` of a party, their new graphs, and the sums.

    ``graphs`` maps the names of new stages to their graphs.
    """

    phases: tuple[Phase, ...]
    graphs: Mapping[str, ir.Graph] = field(default_factory=dict)
    accumulators: tuple[TensorSpec, ...] = ()


def divide_step(
    train: Phase,
    own: Mapping[str, Sequence[TensorSpec]],
    gradients: Mapping[str, str],
    party: str,
) -> AccumulatingPhases:
    """Divide a party's phase ``train`` into one that accumulates gradients and one that updates.

    ``own`` maps each party to the parameters that it updates, and ``gradients`` each parameter to
    the name of its gradient.  The last stages of ``train`` are those that update.
    """
    is_split = SERVER in own
    ends = [stage for stage in train.stages if stage.name in ("norms", "update")]
    updated = {name for stage in ends for name in stage.outputs}
    sums = {spec.name: _rename(spec, f"{spec.name}{SUM}") for spec in own[party]}
    graphs = _build_graphs(own[party], gradients, sums) if sums else {}
    stages = [stage for stage in train.stages if stage not in ends]
    wires = [wire for wire in train.wires if wire.kind is not WireKind.NORM]
    data = [*train.data, _WEIGHT] if party == CLIENT else train.data
    if sums:
        place = Source.DATA if party == CLIENT else Source.WIRE
        sources = {MICRO_BATCH_WEIGHT: place, **{sum_.name: Source.STATE for sum_ in sums.values()}}
        stages.append(_describe(ACCUMULATE, graphs[ACCUMULATE], sources))
        sources = {sum_.name: Source.STATE for sum_ in sums.values()}
        ends.insert(0, _describe(_GRADIENTS, graphs[_GRADIENTS], sources))
    if is_split and own[SERVER]:
        wires.append(_declare(_WEIGHT, CLIENT))
    adding = Phase(
        name=ACCUMULATE,
        stages=tuple(stages),
        data=tuple(data),
        wires=tuple(wires),
        results=train.results,
        commits={
            **{name: value for name, value in train.commits.items() if value not in updated},
            **{sum_.name: f"{sum_.name}{NEXT}" for sum_ in sums.values()},
        },
    )
    norms = [wire for wire in train.wires if wire.kind is WireKind.NORM]
    if party == SERVER:
        awaited = [wire for wire in norms if wire.receiver == SERVER]
        graphs[_CONFIRM] = _build_confirmation(awaited)
        sources = {value.name or "": Source.WIRE for value in graphs[_CONFIRM].inputs}
        confirm = _describe(_CONFIRM, graphs[_CONFIRM], sources)
        # before it updates, so that the client need not wait for that
        index = next((i for i, stage in enumerate(ends) if stage.name == "update"), len(ends))
        ends.insert(index, confirm)
    confirmed = _rename(_COUNT, CONFIRMED)
    both = [_declare(_COUNT, CLIENT), *norms, _declare(confirmed, SERVER)] if is_split else []
    updating = Phase(
        name=UPDATE,
        stages=tuple(ends),
        data=(_COUNT,) if is_split and party == CLIENT else (),
        wires=tuple(both),
        commits={name: value for name, value in train.commits.items() if value in updated},
    )
    return AccumulatingPhases(
        phases=(adding, updating), graphs=graphs, accumulators=tuple(sums.values())
    )


def _build_graphs(
    parameters: Sequence[TensorSpec],
    gradients: Mapping[str, str],
    sums: Mapping[str, TensorSpec],
) -> dict[str, ir.Graph]:
    """Build the graph that adds a micro-batch's gradients, and the one that hands the sums on."""
    adder, reader = InputGraph(ACCUMULATE), InputGraph(_GRADIENTS)
    weight = adder.input(MICRO_BATCH_WEIGHT, "F32", ())
    added, read = {}, {}
    for spec in parameters:
        name = sums[spec.name].name
        gradient = adder.input(gradients[spec.name], spec.dtype, spec.shape)
        factor = adder.fit(adder.cast(weight, gradient.dtype), spec)
        term = adder.op("Mul", gradient, factor)
        value = adder.op("Add", adder.input(name, spec.dtype, spec.shape), term)
        value.type, value.shape = gradient.type, gradient.shape
        added[f"{name}{NEXT}"] = value
        copy = reader.op("Identity", reader.input(name, spec.dtype, spec.shape))
        copy.type, copy.shape = gradient.type, gradient.shape
        read[gradients[spec.name]] = copy
    return {ACCUMULATE: adder.finish(added), _GRADIENTS: reader.finish(read)}


def _build_confirmation(norms: Sequence[Wire]) -> ir.Graph:
    """Build the graph that returns the number of micro-batches once all ``norms`` have arrived."""
    builder = InputGraph(_CONFIRM)
    result = builder.input(MICRO_BATCHES, "I64", ())
    nothing = builder.integer(0)
    for wire in norms:
        vector = builder.input(wire.tensor.name, wire.tensor.dtype, wire.tensor.shape)
        size = builder.op("Mul", builder.op("Size", vector), nothing)
        result = builder.op("Add", result, size)
    result = builder.op("Identity", result)
    result.type, result.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([])
    return builder.finish({CONFIRMED: result})


def _describe(name: str, graph: ir.Graph, sources: Mapping[str, Source]) -> Stage:
    inputs = [value.name or "" for value in graph.inputs]
    return Stage(
        name=name,
        graph=f"{name}.onnx",
        inputs=tuple(StageInput(name=n, source=sources.get(n, Source.STASH)) for n in inputs),
        outputs=tuple(value.name or "" for value in graph.outputs),
    )


def _declare(tensor: TensorSpec, sender: str) -> Wire:
    receiver = SERVER if sender == CLIENT else CLIENT
    return Wire(tensor=tensor, sender=sender, receiver=receiver, kind=WireKind.COUNT)


def _rename(spec: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name=name, dtype=spec.dtype, shape=spec.shape)


def explain_unweighable(losses: Sequence[Loss], *, is_private: bool) -> str:
    """Return why micro-batches cannot be weighed in these losses; empty if they can.

    ``is_private`` means that the server trains parameters and must not learn the labels.
    """
    if any(loss.kind in (FROM_MODEL, FROM_FILE) for loss in losses):
        return (
            "its loss is computed by the model or by a file, which do not say how much each "
            "micro-batch counts in the loss of the batch; name a loss such as cross-entropy and "
            "an output (--loss, --output) when the model is cut"
        )
    if any(loss.label_smoothing and 0 in loss.class_weights for loss in losses):
        return (
            "a loss with label smoothing has a class of weight 0, so a micro-batch in which "
            "nothing counts may still add to the loss of the batch; cut the model with a small "
            "weight in place of 0"
        )
    if is_private and any(loss.weighs for loss in losses):
        return (
            "the labels stay with the client, and how much each micro-batch counts would tell the "
            "server something about them, as labels are ignored or weighed; cut the model without "
            "ignore_index, class weights and sample weights, or so that the server has the loss"
        )
    return ""


def build_weighing(
    losses: Sequence[Loss], data: Mapping[str, TensorSpec]
) -> tuple[Phase, ir.Graph]:
    """Build the client's phase that computes what counts in each loss and metric of a micro-batch.

    ``data`` declares the arrays of training, by name.
    """
    builder = InputGraph(WEIGH)
    results: dict[str, ir.Value] = {}
    for loss in losses:
        suffix = f".{loss.name}" if len(losses) > 1 else ""
        labels = _read(builder, data[loss.array])
        weights = None if loss.sample_weights is None else data[loss.sample_weights]
        samples = None if weights is None else _read(builder, weights)
        for name, value in count_labels(builder, loss, labels, samples).items():
            results[f"{name}{suffix}{COUNTED}"] = builder.op("Identity", value)
        if suffix:
            factor = builder.number(loss.weight, ir.DataType.FLOAT)
            results[f"{LOSS}{suffix}{WEIGHT}"] = builder.op("Identity", factor)
    for value in results.values():
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph = builder.finish(results)
    stage = _describe(WEIGH, graph, dict.fromkeys(data, Source.DATA))
    used = {entry.name for entry in stage.inputs}
    read = tuple(spec for name, spec in data.items() if name in used)
    return Phase(name=WEIGH, stages=(stage,), data=read, results=stage.outputs), graph


def _read(builder: InputGraph, spec: TensorSpec) -> ir.Value:
    return builder.input(spec.name, spec.dtype, spec.shape)
