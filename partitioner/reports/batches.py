"""Find where an export fixed the batch size: in the inputs, or in constants within the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from splitonnx.errors import BatchNotFreed, MixedSamples, SplitonnxError
from splitonnx.partitioner.cutting.conformance.freeing_trials import Trials
from splitonnx.partitioner.cutting.passes.batch_decisions import describe_decided
from splitonnx.partitioner.cutting.passes.batches import describe_freed, find_fixing_node
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.gate.exporters import CALL
from splitonnx.partitioner.graphs.builders import known_array
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.normalization.recurrence_layouts import FIRST_STATES
from splitonnx.partitioner.reports.remarks import Kind, Remark, list_names, make_option

_BROADCASTING = frozenset({"Add", "Div", "Mul", "Sub", "Where"})


def note_batch(prepared: PreparedModel, output: str, noticed: Sequence[Remark]) -> Sequence[Remark]:
    """Return remarks on what was changed for a batch of 1, and on a node that fixes the batch."""
    changes = (describe_freed(prepared.freed), describe_decided(prepared.decided))
    remarks = [Remark(kind=Kind.BATCH, sentence=sentence) for sentence in changes if sentence]
    fixing = find_fixing_node(prepared.training.graph, prepared.state, output)
    if fixing and all(remark.kind is not Kind.FIXED_BATCH for remark in noticed):
        remarks.append(Remark(kind=Kind.FIXED_BATCH, sentence=fixing))
    return remarks


def remark_on_batches(
    prepared: PreparedModel, output: str, producer: str, trials: Trials
) -> Iterator[Remark]:
    """Yield remarks on a batch size that is fixed by the inputs or by constants in the graph.

    ``output`` is the output from which the loss is computed.  ``producer`` is the name and version
    of the exporter; the advice on how to export the model again depends on it.  ``trials`` tests
    whether the model still works if a batch size fixed by the inputs is made variable.
    """
    graph = prepared.skeleton.graph
    raw = [v for v in graph.inputs if v.name not in prepared.state and v.shape is not None]
    raw = [value for value in raw if value.shape is not None and len(value.shape)]
    firsts = {_read_dims(value)[0] for value in raw}
    result = map_values(graph).get(output)
    first = _read_dims(result)[:1] if result is not None else []
    fixed = {dim for dim in firsts if isinstance(dim, int)}
    symbols = {dim for value in raw for dim in _read_dims(value) if isinstance(dim, str)}
    likely = fixed == {1} or not symbols  # otherwise the batch may be on another axis
    likely &= not prepared.states  # a state may have a batch, which must be fixed
    decided = fixed.intersection(prepared.adjustments.dims.values())  # by the user
    if decided and fixed == firsts:
        return
    if likely and raw and fixed == firsts and len(fixed) == 1 and first == list(fixed):
        names = tuple(value.name or "" for value in raw)
        tried = trials.free(prepared.adjustments, names)
        yield _remark_on_inputs(names, output, fixed.pop(), producer, tried)
        return
    held = list(_find_constants(graph, symbols))
    if not held and not prepared.states and (single := trials.explain_single(prepared)):
        options = tuple(make_option("--dim", f"{symbol}=1") for symbol in firsts - fixed)
        fixing = find_fixing_node(prepared.training.graph, prepared.state, output)
        yield Remark(kind=Kind.FIXED_BATCH, sentence=fixing or single, options=options)
    for symbol, batch in dict.fromkeys((symbol, batch) for _, symbol, batch in held):
        nodes = tuple(node.name or "" for node, *own in held if own == [symbol, batch])
        yield Remark(
            kind=Kind.FIXED_BATCH,
            sentence=f"a {'batch' if symbol in firsts else 'size'} of {batch} is fixed by "
            f"constants of {list_names(nodes)}, though the inputs leave it open as '{symbol}': "
            "export again with sizes taken from the input, such as x.shape[0] or -1, or train "
            "with this size alone",
            names=nodes,
            options=(make_option("--dim", f"{symbol}={batch}"),),
        )


def _remark_on_inputs(
    names: tuple[str, ...],
    output: str,
    batch: int,
    producer: str,
    tried: list[str] | SplitonnxError,
) -> Remark:
    """Remark on a batch that the inputs fix; ``tried`` is the result of trying to free it."""
    options = tuple(make_option("--dim", f"{name}:0=N") for name in names)
    return Remark(
        kind=Kind.FIXED_BATCH,
        sentence=f"the batch is fixed at {batch} by {list_names(names)}: every batch must have "
        f"{batch} {'sample' if batch == 1 else 'samples'}, as with --batch-size {batch}; export "
        f"again with a dynamic batch{_advise(names, output, producer)}"
        f"{_describe_freeing(' '.join(options), len(options) > 1, tried)}",
        names=names,
        options=() if isinstance(tried, SplitonnxError) else options,
    )


def _describe_freeing(options: str, are_several: bool, tried: list[str] | SplitonnxError) -> str:
    if isinstance(tried, MixedSamples):
        return (
            f"; with {options}, node '{tried.node}' ({tried.operator}) would mix or drop samples, "
            "so cut refuses it"
        )
    if isinstance(tried, BatchNotFreed):
        return f"; with {options}, it would not run on {tried.tried} samples, so cut refuses it"
    if isinstance(tried, SplitonnxError):
        return f"; cut refuses {options}: {tried}"
    notes = "".join(f"; {note}" for note in tried)
    return f", or {options} {'free' if are_several else 'frees'} it{notes}"


def _advise(names: tuple[str, ...], output: str, producer: str) -> str:
    if producer.lower().startswith("pytorch"):
        axes = ", ".join(f"'{name}': {{0: 'N'}}" for name in (*names, output))
        return f" ({CALL}, or dynamic_axes={{{axes}}}, or dynamic_shapes with dynamo=True)"
    return ""


def _read_dims(value: ir.Value) -> list[int | str | None]:
    shape = value.shape if value.shape is not None else ()
    return [dim if isinstance(dim, int) else dim.value for dim in shape]


def _find_constants(graph: ir.Graph, symbols: set[str]) -> Iterator[tuple[ir.Node, str, int]]:
    """Yield each node in which a constant fixes a dimension that the inputs leave open.

    Each item consists of the node, the symbol of the dimension, and the size.
    """
    for node in graph:
        if node.domain:
            continue
        if node.op_type == "Reshape":
            found = _read_target(node)
        elif node.op_type in FIRST_STATES:
            found = _read_first_states(node)
        elif node.op_type == "Concat":
            found = _read_parts(node)
        elif node.op_type == "Split":
            found = _read_pieces(node)
        elif node.op_type in _BROADCASTING:
            found = _read_operands(node)
        else:
            continue
        if found is not None and found[0] in symbols:
            yield node, *found


def _read_target(node: ir.Node) -> tuple[str, int] | None:
    """Read the size of a tensor's only unknown dimension from a Reshape to constant sizes."""
    source, target = node.inputs[0], known_array(node.inputs[1])
    if source is None or source.shape is None or target is None or (target <= 0).any():
        return None
    dims = _read_dims(source)
    open_dims = [dim for dim in dims if not isinstance(dim, int)]
    elements, rest = int(target.prod()), 1
    for dim in dims:
        rest *= dim if isinstance(dim, int) else 1
    if len(open_dims) != 1 or open_dims[0] is None or not rest or elements % rest:
        return None
    return str(open_dims[0]), elements // rest


def _read_first_states(node: ir.Node) -> tuple[str, int] | None:
    axis = 0 if node.attributes.get_int("layout", 0) else 1
    source = node.inputs[0]
    dims = _read_dims(source) if source is not None else []
    for index in FIRST_STATES[node.op_type]:
        state = node.inputs[index] if index < len(node.inputs) else None
        size = _read_dims(state)[axis : axis + 1] if state is not None else []
        if size and isinstance(size[0], int) and len(dims) > axis and isinstance(dims[axis], str):
            return str(dims[axis]), size[0]
    return None


def _read_parts(node: ir.Node) -> tuple[str, int] | None:
    """Read the batch size from a Concat along another axis, if it is fixed in some of the parts."""
    shapes = [_read_dims(value) for value in node.inputs if value is not None]
    axis = node.attributes.get_int("axis", 0)
    if not all(shapes) or axis in (0, -len(shapes[0])):
        return None
    firsts = list(dict.fromkeys(dims[0] for dims in shapes))
    symbols = [dim for dim in firsts if isinstance(dim, str)]
    sizes = [dim for dim in firsts if isinstance(dim, int)]
    return (symbols[0], sizes[0]) if len(symbols) == 1 and len(sizes) == 1 else None


def _read_pieces(node: ir.Node) -> tuple[str, int] | None:
    """Read the size of the axis that a Split divides, if it is the sum of constant sizes."""
    dims = _read_dims(node.inputs[0]) if node.inputs[0] is not None else []
    axis = node.attributes.get_int("axis", 0)
    sizes = known_array(node.inputs[1]) if len(node.inputs) > 1 else None
    dim = dims[axis] if -len(dims) <= axis < len(dims) else None
    return (dim, int(sizes.sum())) if isinstance(dim, str) and sizes is not None else None


def _read_operands(node: ir.Node) -> tuple[str, int] | None:
    """Read the size that an operand with fixed dimensions forces on another by broadcasting."""
    shapes = [_read_dims(value)[::-1] for value in node.inputs if value is not None]
    fixed = [dims for dims in shapes if all(isinstance(dim, int) for dim in dims)]
    for dims in shapes:
        for other in fixed:
            for dim, size in zip(dims, other, strict=False):
                if isinstance(dim, str) and isinstance(size, int) and size > 1:
                    return dim, size
    return None
