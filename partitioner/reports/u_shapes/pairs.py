"""List the pairs that ``cut`` accepts for a U-shape, with their bytes and trained elements."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import onnx_ir as ir

from splitonnx.disclosures import count_bytes_per_sample
from splitonnx.expressions import describe_size, is_name
from splitonnx.losses import Loss, LossSource
from splitonnx.names import DropoutMode
from splitonnx.partitioner.cutting.candidates.pairs import Pair, PairSearch, Tensors
from splitonnx.partitioner.cutting.carried_states.declarations import Pairs
from splitonnx.partitioner.cutting.carried_states.placements import leave_out_states
from splitonnx.partitioner.cutting.carried_states.raw_inputs import trace_raw_inputs
from splitonnx.partitioner.cutting.cuts import find_lost
from splitonnx.partitioner.cutting.divisions import find_needed, keep_reached, keep_returned
from splitonnx.partitioner.cutting.passes.given_names import resolve_names
from splitonnx.partitioner.cutting.ports import declare
from splitonnx.partitioner.cutting.preparations import (
    PreparedModel,
    count_trained,
)
from splitonnx.partitioner.differentiation.label_traces import find_bare_ends, trace_told_inputs
from splitonnx.partitioner.gate.adjustments import Adjustments, Binding
from splitonnx.partitioner.gate.gates import ModelSource
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.pauses import pause_collection
from splitonnx.partitioner.graphs.traversals import (
    find_moving,
    is_float,
    list_inputs,
    map_values,
    reads_size,
    trace_gradients,
    walk_back,
)
from splitonnx.partitioner.legal_cuts import (
    can_travel,
    find_read_outputs,
    keeps_states,
    list_forms,
    resolve_sent,
)
from splitonnx.partitioner.model_losses import list_predicted
from splitonnx.partitioner.partitions import refuse_untrainable
from splitonnx.partitioner.reports.inspections import describe_dims, open_prepared
from splitonnx.partitioner.reports.u_shapes.recommendations import find_recommended
from splitonnx.tensors import DTYPES, TensorSpec


@dataclass(frozen=True, kw_only=True)
class PairCandidate:
    """The two ends of a U-shaped cut that ``cut`` accepts.

    ``at`` names the tensors that the client sends, including raw inputs, and ``tail_at`` those that
    the server sends back; ``at_shapes`` and ``tail_shapes`` are their shapes.  ``bytes_up`` and
    ``bytes_down`` are the numbers of bytes per sample that a training step sends to the server and
    back, for activations and gradients.  They are ``None`` if a size is unknown.
    ``head_parameters``, ``server_parameters`` and ``tail_parameters`` are the numbers of elements
    of the trained parameters in the client's part before the server's, in the server's part, and in
    the client's part after it.
    ``client_share`` is the fraction of all trained elements that are at the client, from 0 to 1.
    ``tells_labels`` is true if the client has no layer of weights between ``tail_at`` and the loss:
    the server can then compute the labels from the gradient, and ``cut`` requires ``send_labels``.
    If the model ends in its own loss, ``tells_inputs`` names the inputs that the gradient tells in
    this way, usually the labels; ``cut`` then requires that ``send_inputs`` names these.
    ``recommended`` is true if the pair is worth considering; see :mod:`recommendations`.
    """

    at: tuple[str, ...]
    tail_at: tuple[str, ...]
    at_shapes: tuple[tuple[int | str | None, ...], ...]
    tail_shapes: tuple[tuple[int | str | None, ...], ...]
    bytes_up: int | None
    bytes_down: int | None
    head_parameters: int
    tail_parameters: int
    server_parameters: int
    client_share: float
    tells_labels: bool = False
    tells_inputs: tuple[str, ...] = ()
    recommended: bool = False


@pause_collection()
def inspect_pairs(
    model: ModelSource,
    *,
    at: str | Sequence[str] = (),
    tail_at: str | Sequence[str] = (),
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
) -> list[PairCandidate]:
    """List the pairs of tensors at which ``cut`` can cut a model in a U-shape.

    Args:
        model: a path, the bytes of an ONNX model, or a loaded model.
        at: the tensors that the client sends, as for ``cut``; by default each tensor is tried.
        tail_at: the tensors that the server sends back, as for ``cut``; by default each tensor is
            tried.
        sent: raw inputs, such as an attention mask, that may be sent together with each tensor.
        dims, bind, states: sizes, values and states of inputs, as for ``cut``.
        dequantize: whether to replace integer arithmetic, as for ``cut``.
        output: the output from which the loss is computed; by default the first float output.
        loss: the loss, or several, as for ``cut``.  By default, an output that is a single number
            is itself the loss, and all other outputs have one that compares them with labels.
        dropout: whether Dropout nodes are on, as for ``cut``.
        train, freeze: regular expressions for what is trained and what is not, as for ``cut``.

    Returns:
        The pairs, ordered by the first tensor and then by the last, as in the graph.

    Raises:
        ModelError: the model cannot be read or prepared.
        TooManyTries: the model has too many pairs to check; give ``at`` or ``tail_at``.
        UnknownTensor, UsageError: a name matches nothing, a name in ``sent`` is not an input of the
            model, or ``output`` is not one of its outputs.
    """
    adjustments = Adjustments(dims=dims or {}, bindings=bind or {}, dequantize=dequantize)
    prepared = open_prepared(
        model, adjustments, dropout=dropout, train=train, freeze=freeze, states=states
    )
    return list_pairs(prepared, at=at, tail_at=tail_at, sent=sent, output=output, loss=loss)


@attribute_errors_to_pass("searched for U-shaped cuts")
def list_pairs(
    prepared: PreparedModel,
    *,
    at: str | Sequence[str] = (),
    tail_at: str | Sequence[str] = (),
    sent: Sequence[str] = (),
    output: str | None = None,
    loss: LossSource | None = None,
) -> list[PairCandidate]:
    """List the pairs of a prepared model as :func:`inspect_pairs` does."""
    reads = find_read_outputs(prepared, loss, output)
    prepared = leave_out_states(prepared, reads.names)
    for name in reads.names:
        refuse_untrainable(prepared, name)
    first, last = ((names,) if isinstance(names, str) else names for names in (at, tail_at))
    found = list(_find_pairs(prepared, reads.own, first, last, sent))
    rows = _find_rows(prepared)
    with _limit_outputs(prepared, reads.names):
        form = _TrainingForm(prepared, has_own_loss=bool(reads.own))
        pairs = [
            form.describe(pair, trained, rows)
            for pair in found
            if _can_be_sent(pair, prepared.inference.graph, prepared.trainable)
            and (trained := form.divide(pair)) is not None
            and keeps_states(prepared, pair.at, pair.tail_at, reads.names)
        ]
    return [
        replace(pair, recommended=recommended)
        for pair, recommended in zip(pairs, find_recommended(pairs), strict=True)
    ]


def _find_pairs(
    prepared: PreparedModel,
    own: Sequence[Loss],
    at: Sequence[str],
    tail_at: Sequence[str],
    sent: Sequence[str],
) -> Iterator[Pair]:
    """Yield the pairs that are legal for prediction, which may do without the losses in ``own``.

    Pairs with an end within such a loss come last.
    """
    for form, left in list_forms(prepared, own):
        graph = form.inference.graph
        search = PairSearch(
            graph,
            state=form.state,
            trainable=form.trainable,
            sent=resolve_sent(graph, list_predicted(form, sent, prepared), form),
        )
        ends = [list_predicted(form, names, prepared) for names in (at, tail_at)]
        if any(given and not named for given, named in zip((at, tail_at), ends, strict=True)):
            continue  # an end is within a loss
        resolved = [resolve_names(graph, names, form.given) or None for names in ends]
        for pair in search.find(*resolved):
            made = {value for value in (*pair.at, *pair.tail_at) if value.producer() is not None}
            if not left or any(value.name not in left for value in made):
                yield pair


@contextmanager
def _limit_outputs(prepared: PreparedModel, names: Sequence[str]) -> Iterator[None]:
    """Remove all outputs of the training form except those with a loss, and restore them."""
    graph = prepared.training.graph
    outputs = list(graph.outputs)
    values = map_values(graph)
    graph.outputs[:] = [values[name] for name in names]
    try:
        yield
    finally:
        graph.outputs[:] = outputs


def _can_be_sent(pair: Pair, graph: ir.Graph, trainable: Collection[str]) -> bool:
    """Return whether the tensors of a pair can be sent, without blocking a gradient."""
    return all(can_travel(value) for value in (*pair.at, *pair.tail_at)) and not any(
        find_lost(end, trainable) for end in (pair.at, pair.tail_at) if not all(map(is_float, end))
    )


class _TrainingForm:
    """The training form of a model; only the outputs from which losses are computed count."""

    def __init__(self, prepared: PreparedModel, *, has_own_loss: bool) -> None:
        self._graph = prepared.training.graph
        self._trainable = prepared.trainable
        self._elements = count_trained(
            prepared, [value.name or "" for value in self._graph.outputs]
        )
        self._search = PairSearch(self._graph, state=prepared.state, trainable=self._trainable)
        readers = {node for node in self._graph if reads_size(node)}
        self._total = self._count(walk_back(self._graph.outputs, ends=readers)[0])
        self._values = map_values(self._graph)
        self._needed = find_needed(self._graph)
        self._trained = find_moving(
            self._graph, [v for v in self._graph.inputs if v.name in self._elements]
        )
        self._reached = trace_gradients(self._graph.outputs)
        layers, scalings = prepared.gradient_layers, prepared.gradient_scalings
        self._bare = set() if has_own_loss else find_bare_ends(self._graph, layers, scalings)
        self._told: Mapping[ir.Value, frozenset[str]] = {}
        if has_own_loss:
            data = {value.name or "" for value in self._graph.inputs} - prepared.state
            raw = trace_raw_inputs(self._graph, data, prepared, {})
            self._told = trace_told_inputs(self._graph, raw, layers, scalings)

    def divide(self, pair: Pair) -> Pair | None:
        """Divide the training form at a pair of the inference form, if this is legal.

        Tensors that the loss does not need are left out.
        """
        at, tail_at = (
            tuple(v for v in (self._values.get(value.name or "") for value in end) if v)
            for end in (pair.at, pair.tail_at)
        )
        if len(at) < len(pair.at) or len(tail_at) < len(pair.tail_at):
            return None
        at, tail_at = (tuple(v for v in end if v in self._needed) for end in (at, tail_at))
        if not (at and tail_at):
            return None
        tail_at = tuple(keep_returned(self._graph, tail_at))
        found = self._search.try_pair(tuple(keep_reached(self._graph, at, tail_at)), tail_at)
        if found is None or not _can_be_sent(found, self._graph, self._trainable):
            return None
        return found

    def describe(self, pair: Pair, trained: Pair, rows: str | int | None) -> PairCandidate:
        """Describe a pair; ``trained`` is the same pair in the training form.

        ``rows`` is the number of samples, or the symbol for it.
        """
        server = self._count(trained.server)
        client = self._total - server  # no parameter is used by both
        head = self._count(walk_back(trained.at)[0])
        back = self._list_returned(trained)
        first, last = (self._declare(end) for end in (pair.at, pair.tail_at))
        told = (self._told.get(v, ()) for v in trained.tail_at if v.name in back)
        inputs = tuple(sorted({name for names in told for name in names}))
        sent = [first[value.name or ""] for value in trained.at]
        returned = [last[value.name or ""] for value in trained.tail_at]
        return PairCandidate(
            at=tuple(first),
            tail_at=tuple(last),
            at_shapes=tuple(describe_dims(spec.shape) for spec in first.values()),
            tail_shapes=tuple(describe_dims(spec.shape) for spec in last.values()),
            bytes_up=_sum_bytes([*sent, *(last[name] for name in last if name in back)], rows),
            bytes_down=_sum_bytes([*returned, *(first[n] for n in first if n in back)], rows),
            head_parameters=head,
            tail_parameters=client - head,
            server_parameters=server,
            client_share=client / ((client + server) or 1),
            tells_labels=bool(inputs)
            or any(v.name in back and v in self._bare for v in trained.tail_at),
            tells_inputs=inputs,
        )

    def _declare(self, end: Tensors) -> dict[str, TensorSpec]:
        """Declare the tensors of an end by name; tensors that training sends, as they are sent."""
        return {
            value.name or "": declare(self._values.get(value.name or "", value)) for value in end
        }

    def _count(self, nodes: Collection[ir.Node]) -> int:
        read = {value.name for node in nodes for value in list_inputs(node)}
        return sum(size for name, size in self._elements.items() if name in read)

    def _list_returned(self, pair: Pair) -> set[str]:
        """Return the names of the tensors of a pair whose gradients are sent back."""
        tail = [value for value in pair.tail_at if value in self._reached & self._trained]
        passed = trace_gradients(tail, ends=pair.at, within=pair.server)
        head = [value for value in pair.at if value in passed and value in self._trained]
        return {value.name or "" for value in (*tail, *head)}


def _find_rows(prepared: PreparedModel) -> str | int | None:
    """Return the first dimension of all of the model's inputs, or ``None`` if they differ."""
    graph = prepared.inference.graph
    specs = [declare(value) for value in graph.inputs if value.name not in prepared.state]
    rows = {spec.shape[0] for spec in specs if spec.shape}
    size = next(iter(rows), None)
    if len(rows) != 1 or (isinstance(size, str) and not is_name(describe_size(size))):
        return None
    return size


def _sum_bytes(specs: Sequence[TensorSpec], rows: str | int | None) -> int | None:
    sizes = [_count_bytes(spec, rows) for spec in specs]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _count_bytes(spec: TensorSpec, rows: str | int | None) -> int | None:
    """Return the size of a tensor per sample, or ``None`` if it is unknown."""
    if not isinstance(rows, int):
        return count_bytes_per_sample(spec, rows)
    dims = [dim for dim in spec.shape if isinstance(dim, int)]
    size, rest = divmod(DTYPES[spec.dtype].itemsize * math.prod(dims), rows)
    return size if len(dims) == len(spec.shape) and not rest else None
