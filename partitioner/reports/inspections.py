"""List the single tensors at which a model can be cut, alone or together with given raw inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import SplitonnxError, TooManyTries, UsageError, quote
from splitonnx.expressions import describe_size
from splitonnx.losses import LossSource
from splitonnx.names import DropoutMode
from splitonnx.partitioner.cutting.candidates.bisections import Bisection
from splitonnx.partitioner.cutting.carried_states.declarations import Pairs, list_pairs
from splitonnx.partitioner.cutting.carried_states.placements import (
    leave_out_states,
)
from splitonnx.partitioner.cutting.carried_states.raw_inputs import (
    trace_held_inputs,
    trace_raw_inputs,
)
from splitonnx.partitioner.cutting.ports import declare
from splitonnx.partitioner.cutting.preparations import (
    PreparedModel,
    choose_output,
    count_trained,
    prepare,
)
from splitonnx.partitioner.cutting.transforms.choices import count_bytes
from splitonnx.partitioner.gate.adjustments import Adjustments, Binding
from splitonnx.partitioner.gate.gates import ModelSource, open_model
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.pauses import pause_collection
from splitonnx.partitioner.graphs.traversals import (
    find_moving,
    map_values,
    trace_gradients,
)
from splitonnx.partitioner.inference.folds import note_shapes
from splitonnx.partitioner.inference.shapes import infer_shapes
from splitonnx.partitioner.legal_cuts import ReadOutputs, find_legal_cuts, find_read_outputs
from splitonnx.partitioner.partitions import refuse_untrainable
from splitonnx.tensors import DTYPES
from splitonnx.wire_codecs import PLAIN, Codec, WireCodecs, read_wire


@dataclass(frozen=True, kw_only=True)
class CutCandidate:
    """A tensor at which a model can be cut, alone or together with raw inputs.

    ``op`` is the operator that computes the tensor.  ``shape`` holds a number for each known
    dimension, and a symbol or ``None`` for each unknown dimension.  ``bytes_up`` is the number of
    bytes sent to the server in one training step, for the tensor and the inputs in ``sent``.
    ``bytes_down`` is the number of bytes sent back for the gradient; it is 0 if the tensor does not
    depend on a trained parameter.  A number of bytes is ``None`` if it is not known.
    ``client_parameters`` and ``server_parameters`` are the numbers of elements of the trained
    parameters at the client and at the server.  Only parameters that get a gradient from the output
    with the loss count as trained.  ``sent`` names the raw inputs that must be sent together with
    the tensor.  ``raw`` names the raw inputs that this cut reveals to the server: the inputs in
    ``sent``, and those from which the tensor is computed without a layer of weights.  If there
    are any, ``cut`` requires ``send_inputs``.
    """

    tensor: str
    op: str
    shape: tuple[int | str | None, ...]
    bytes_up: int | None
    bytes_down: int | None
    client_parameters: int
    server_parameters: int
    sent: tuple[str, ...] = ()
    raw: tuple[str, ...] = ()


@pause_collection()
def inspect(
    model: ModelSource,
    *,
    batch: int | None = None,
    sent: Sequence[str] = (),
    dims: Mapping[str, int | str] | None = None,
    bind: Mapping[str, Binding] | None = None,
    states: Pairs = (),
    dequantize: bool = False,
    output: str | None = None,
    loss: LossSource | None = None,
    dropout: DropoutMode | None = None,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    wire: str | Mapping[str, str] | None = None,
) -> list[CutCandidate]:
    """List the single tensors at which a model can be cut, in the order of the graph.

    Args:
        model: a path, the bytes of an ONNX model, or a loaded model.
        batch: the batch size (the first dimension of the model's inputs), for models that do not
            fix it. Sizes in bytes cannot be computed if the batch size is not known.
        sent: raw inputs, such as an attention mask, that may be sent together with each tensor.
        dims, bind, states: sizes, values and states of inputs, as for ``cut``.
        dequantize: whether to replace integer arithmetic, as for ``cut``.
        output: the output from which the loss is computed; by default the first float output.
        loss: the loss, or several, as for ``cut``.  By default, an output that is a single number
            is itself the loss, and all other outputs have one that compares them with labels.
        dropout: whether Dropout nodes are on, as for ``cut``.
        train, freeze: regular expressions for what is trained and what is not, as for ``cut``.
        wire: the codecs of what crosses the cut, as for ``cut``.  Bytes that depend on it are
            ``None`` for a tensor that the codec cannot encode.

    Raises:
        ModelError: the model cannot be read, prepared or differentiated, so no cut is valid.
        UnknownTensor, UsageError: a name in ``sent`` is not an input of the model, ``output`` is
            not one of its outputs, or nothing can be trained.
    """
    codecs = read_wire(wire)
    adjustments = Adjustments(dims=dims or {}, bindings=bind or {}, dequantize=dequantize)
    prepared = open_prepared(
        model, adjustments, dropout=dropout, train=train, freeze=freeze, states=states
    )
    reads = find_read_outputs(prepared, loss, output)
    return list_cuts(prepared, batch, sent, reads, codecs)


def open_prepared(
    model: ModelSource,
    adjustments: Adjustments,
    *,
    dropout: DropoutMode | None,
    train: Sequence[str],
    freeze: Sequence[str],
    states: Pairs,
) -> PreparedModel:
    """Read and prepare a model whose cuts are to be listed; ``cut`` explains the arguments.

    Raises:
        ModelError: the model cannot be read or prepared.
        UsageError: an argument does not fit the model.
    """
    return prepare(
        open_model(model, adjustments),
        dropout=dropout,
        train=train,
        freeze=freeze,
        adjustments=adjustments,
        states=list_pairs(states),
    )


@attribute_errors_to_pass("searched for cuts")
def list_cuts(
    prepared: PreparedModel,
    batch: int | None,
    sent: Sequence[str] = (),
    reads: ReadOutputs | None = None,
    codecs: WireCodecs | None = None,
) -> list[CutCandidate]:
    """List the single tensors at which a prepared model can be cut.

    If ``batch`` is given, ``prepared.inference`` is modified in place: its shapes get this batch
    size.  The raw inputs in ``sent`` may be sent together with each tensor.  ``reads`` holds the
    outputs from which the losses are computed, by default the first float output.  ``codecs``
    encode the tensors.

    Raises:
        NotDifferentiable: a node without a gradient is between a trained parameter and the loss.
        UsageError: nothing can be trained, or a name in ``sent`` is not an input.
    """
    outputs = reads.names if reads else (choose_output(prepared, None),)
    prepared = leave_out_states(prepared, outputs)
    form = prepared.inference
    for output in outputs:
        refuse_untrainable(prepared, output)
    if batch is not None:
        _fix_batch(form, prepared, batch)
    elements = count_trained(prepared, outputs)
    found = find_legal_cuts(prepared, elements, sent, reads or ReadOutputs(names=outputs))
    passed = _list_passed(prepared, elements, outputs)
    makers = map_values(prepared.skeleton.graph)
    raw = _trace_raw(prepared)
    return [_describe(each, makers, passed, raw, codecs or WireCodecs()) for each in found]


def _trace_raw(prepared: PreparedModel) -> dict[str, frozenset[str]]:
    """Map the names of tensors to the raw inputs that they hold, in training or in prediction."""
    found: dict[str, frozenset[str]] = {}
    graph = prepared.training.graph
    raw = {value.name or "" for value in graph.inputs} - prepared.state
    held = trace_held_inputs(graph, raw, prepared, prepared.carried)
    for form in (prepared.training, prepared.inference):
        inputs = {value.name or "" for value in form.graph.inputs} - prepared.state
        traced = trace_raw_inputs(form.graph, inputs, prepared, held)
        for value, names in traced.items():
            found[value.name or ""] = found.get(value.name or "", frozenset()) | names
    return found


@pause_collection()
def advise_sent(
    model: ModelSource,
    *,
    dims: Mapping[str, int | str] | None = None,
    bind: Mapping[str, Binding] | None = None,
    states: Pairs = (),
    dequantize: bool = False,
    output: str | None = None,
    loss: LossSource | None = None,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
) -> list[tuple[str, ...]]:
    """List the raw inputs that could be sent together with a tensor to make a cut possible.

    Use this for a model that cannot be cut at any single tensor.  Each entry of the result contains
    one input that makes a cut possible.  If there is no such input, but a cut is possible if all
    inputs may be sent, the only entry contains all inputs.  Otherwise, or if the search would take
    too long, the list is empty.  The arguments have the same meaning as in :func:`inspect`.
    """
    adjustments = Adjustments(dims=dims or {}, bindings=bind or {}, dequantize=dequantize)
    prepared = prepare(
        open_model(model, adjustments),
        train=train,
        freeze=freeze,
        adjustments=adjustments,
        states=list_pairs(states),
    )
    inputs = [v.name or "" for v in prepared.inference.graph.inputs]
    raw = [name for name in inputs if name not in prepared.state]
    reads = find_read_outputs(prepared, loss, output)
    with suppress(TooManyTries):
        found: list[tuple[str, ...]] = [
            (name,) for name in raw if list_cuts(prepared, None, [name], reads)
        ]
        return found or ([tuple(raw)] if list_cuts(prepared, None, raw, reads) else [])
    return []


def _list_passed(
    prepared: PreparedModel, elements: Mapping[str, int], outputs: Sequence[str]
) -> set[str]:
    """Return the names of the tensors through which gradients of ``outputs`` reach parameters."""
    graph = prepared.training.graph
    values = map_values(graph)
    moving = find_moving(graph, [value for value in graph.inputs if elements.get(value.name or "")])
    traced = trace_gradients(values[output] for output in outputs)
    return {value.name or "" for value in moving & traced}


def _fix_batch(model: ir.Model, prepared: PreparedModel, batch: int) -> None:
    inputs = [value for value in model.graph.inputs if value.name not in prepared.state]
    shaped = [value for value in inputs if value.shape is not None and len(value.shape)]
    firsts = {value.shape[0] for value in shaped if value.shape is not None}
    if firsts and all(isinstance(size, int) for size in firsts) and batch not in firsts:
        raise UsageError(
            f"--batch {batch}: the batch of {quote(value.name or '' for value in shaped)} is fixed "
            f"at {', '.join(map(str, sorted(map(str, firsts))))}; leave it out"
        )
    for value in shaped:
        dims = list(value.shape or ())
        if not isinstance(dims[0], int):
            value.shape = ir.Shape([batch, *dims[1:]])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    infer_shapes(model)
    note_shapes(model.graph)


def _describe(
    bisection: Bisection,
    makers: Mapping[str, ir.Value],
    passed: Collection[str],
    raw: Mapping[str, frozenset[str]],
    codecs: WireCodecs,
) -> CutCandidate:
    """Describe a cut.

    ``makers`` maps names to values of the original model, whose operators the user knows.
    ``passed`` names the tensors whose gradients are sent back.  ``raw`` maps names of tensors to
    the raw inputs that they hold.
    """
    value, *sent = bisection.at
    producer = value.producer()
    assert producer is not None
    sizes = [_measure(value, codecs.forward), *(_measure(other) for other in sent)]
    made = makers.get(value.name or "", value).producer()
    return CutCandidate(
        tensor=value.name or "",
        op=made.op_type if made is not None else producer.op_type,
        shape=declare_shape(value)[0],
        bytes_up=None if None in sizes else sum(size or 0 for size in sizes),
        bytes_down=_measure(value, codecs.backward) if value.name in passed else 0,
        client_parameters=bisection.client,
        server_parameters=bisection.server,
        sent=tuple(other.name or "" for other in sent),
        raw=tuple(sorted(set().union(*(raw.get(v.name or "", ()) for v in bisection.at)))),
    )


def declare_shape(value: ir.Value) -> tuple[tuple[int | str | None, ...], int]:
    """Return a value's shape for a reader, and its number of bytes per element.

    Sizes that are not known are ``None``, whatever name inference gives them.  Return ``()`` and 0
    if the value cannot be declared, for example because its type is not known.
    """
    try:
        spec = declare(value)
    except SplitonnxError:
        return (), 0
    return describe_dims(spec.shape), DTYPES[spec.dtype].itemsize


def describe_dims(dims: Sequence[int | str | None]) -> tuple[int | str | None, ...]:
    """Return declared sizes for a reader, with ``None`` for those that only inference named."""
    told = [describe_size(dim) if isinstance(dim, str) else dim for dim in dims]
    return tuple(None if dim == "?" else dim for dim in told)


def _measure(value: ir.Value, codec: Codec = PLAIN) -> int | None:
    try:
        spec = declare(value)
    except SplitonnxError:
        return None
    known = all(isinstance(dim, int) for dim in spec.shape)
    return count_bytes(codec, spec) if known else None
