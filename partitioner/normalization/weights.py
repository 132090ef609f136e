"""Find the parameters of a model, remove them from the graph, and restore them.

A weight becomes a graph input, so the graph that is differentiated stays small even if the weights
are large.  Whether a tensor is a weight depends on its use (see :mod:`parameters`) and on
the user's patterns.  This module deals with names, initializers and Constant nodes.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import count

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel, UsageError, list_some, quote
from splitonnx.manifests import Role
from splitonnx.partitioner.graphs.traversals import list_bodies, list_inputs, list_nodes
from splitonnx.partitioner.normalization.parameters import (
    Classification,
    TensorKind,
    classify_tensor,
    find_input_scalings,
)

_FLOATS = {
    ir.DataType.BFLOAT16,
    ir.DataType.DOUBLE,
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
}

_PARAMETER = TensorKind.PARAMETER

_log = logging.getLogger(__name__)

EVERYTHING = "."
"""The pattern that matches every name.

If ``freeze`` contains this pattern, only the parameters that ``train`` matches are trained.
"""
CHOSEN = "splitonnx.chosen"
"""Metadata key of a weight that is a parameter only because a pattern of ``train`` matched it."""
INNER = "splitonnx.inner"
"""Metadata key for the name of the node whose body contained the weight."""


def lift_weights(graph: ir.Graph, train: Sequence[str] = ()) -> dict[str, ir.TensorProtocol]:
    """Turn parameters and running statistics into graph inputs, and return their tensors by name.

    A weight may be stored in an initializer or a Constant node; models from Paddle's exporter use
    only Constant nodes.  Weights in the subgraph bodies of If, Loop and Scan are included;
    :func:`return_weights` can convert them back to constants.

    ``train`` contains regular expressions for names.  If one of them matches constants but no
    parameter, these constants become parameters.

    Raises:
        UnsupportedModel: a pattern matches no tensor, or only tensors that cannot be trained.
        UsageError: a pattern is not a regular expression.
    """
    _hoist(graph, train)
    stored = dict(list_stored(graph))
    classified = {name: _classify(value, tensor) for name, (value, tensor) in stored.items()}
    lifted = {
        n for n, v in classified.items() if v.kind in (TensorKind.PARAMETER, TensorKind.STATISTIC)
    }
    for pattern in train:
        for name in _find_trained(pattern, classified, graph) - lifted:
            lifted.add(name)
            stored[name][0].metadata_props[CHOSEN] = pattern
    return {name: _lift(graph, *stored[name]) for name in stored if name in lifted}


def return_weights(
    graph: ir.Graph,
    weights: dict[str, ir.TensorProtocol],
    may_train: Callable[[ir.Node], bool],
) -> None:
    """Convert weights that are used only in subgraph bodies back to constants.

    Only weights that are read in bodies of nodes for which ``may_train`` is false are converted.
    They cannot be trained, and are also removed from ``weights``.
    """
    inner = [value for value in graph.inputs if INNER in value.metadata_props]
    holders = [node for node in graph if list_bodies(node) and not may_train(node)] if inner else []
    read = {value for node in holders for value in list_inputs(node)}
    for value in inner:
        if value in read and all(use.node.graph is not graph for use in value.uses()):
            graph.inputs.remove(value)
            tensor = weights.pop(value.name or "")  # not itself: it would be renamed in the file
            value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
            graph.register_initializer(value)


def list_returned(graph: ir.Graph) -> list[ir.Value]:
    """List the weights that :func:`return_weights` converted back to constants."""
    inner = [v for v in graph.initializers.values() if INNER in v.metadata_props]
    return [value for value in inner if value.const_value is not None]


def restore_weights(graph: ir.Graph, weights: Mapping[str, np.ndarray]) -> None:
    """Turn graph inputs back into initializers that contain the values in ``weights``.

    This is the inverse of :func:`lift_weights`.  A 16-bit weight is trained in float32; it is
    rounded to its own type here.  A warning is logged if its numbers are too large for this type.
    """
    for value in [value for value in graph.inputs if value.name in weights]:
        graph.inputs.remove(value)
        array = weights[value.name or ""]
        if value.dtype is not None:
            array = _round(array, value.dtype, value.name or "")
        value.const_value = ir.tensor(array, name=value.name)
        graph.register_initializer(value)


def _round(array: np.ndarray, dtype: ir.DataType, name: str) -> np.ndarray:
    """Convert a weight to a type, and log a warning if finite numbers become infinite."""
    kind = dtype.numpy()
    if kind == array.dtype:
        return array
    with np.errstate(over="ignore"):
        rounded = array.astype(kind)
    if lost := int(np.isinf(rounded).sum() - np.isinf(array).sum()):
        _log.warning(
            "'%s': %d numbers became infinite, because they are too large for the model's type %s",
            name,
            lost,
            dtype.name.lower(),
        )
    return rounded


def assign_roles(
    graph: ir.Graph,
    weights: Mapping[str, ir.TensorProtocol],
    statistics: set[str],
    buffers: set[str],
    *,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    kept: Collection[str] = (),
    constants: Collection[str] = (),
    states: Collection[str] = (),
) -> dict[str, Role]:
    """Classify each weight as a trained parameter, a frozen weight, or a running statistic.

    ``weights`` contains the tensors that :func:`lift_weights` turned into inputs of ``graph``, and
    ``statistics`` the names of all running statistics.  The statistics in ``buffers`` are updated
    by training; the others become frozen weights.  Weights that only normalize a raw input
    (:func:`parameters.find_input_scalings`) are frozen as well.  A weight that matches a pattern in
    ``train`` is trained, even if it also matches a pattern in ``freeze`` or normalizes a raw input.
    ``kept`` names more weights to freeze; names of none are ignored.  ``constants`` names tensors
    that are not weights, which patterns in ``freeze`` may match as well.  ``states`` names graph
    inputs that are not data.

    Raises:
        UnsupportedModel: a pattern in ``freeze`` matches no weight and none of ``constants``.
        UsageError: a pattern is not a regular expression, or a pattern in ``freeze`` has no effect:
            all weights that it matches are also matched by ``train``, or are running statistics
            that training updates.  :data:`EVERYTHING` may be given even if ``train`` matches all
            weights.
    """
    trained = {name for pattern in train for name in find_matches(pattern, weights, "--train")}
    scalings = set(find_input_scalings(graph, weights, states))
    _say_idle_train(graph, weights, scalings, train, freeze)
    frozen: set[str] = set()
    for pattern in freeze:
        found = find_matches(pattern, weights, "--freeze")
        if not found and find_matches(pattern, constants, "--freeze"):
            continue
        if not found:
            raise refuse_unknown("--freeze", pattern, weights)
        if not found - trained and pattern != EVERYTHING:
            raise UsageError(
                f"--freeze {pattern} freezes nothing: --train trains all that it finds; drop one"
            )
        if found <= buffers:
            raise UsageError(
                f"--freeze {pattern} freezes nothing: {list_some(sorted(found))} are running "
                "statistics, which training updates; --batchnorm REGEX=frozen keeps them"
            )
        frozen |= found - trained
    frozen |= (scalings | set(kept)) - trained
    roles: dict[str, Role] = {}
    for name in weights:
        if name in buffers:
            roles[name] = Role.BUFFER
        elif name in statistics or name in frozen:
            roles[name] = Role.FROZEN
        else:
            roles[name] = Role.PARAMETER
    return roles


def _say_idle_train(
    graph: ir.Graph,
    weights: Collection[str],
    scalings: Collection[str],
    train: Sequence[str],
    freeze: Sequence[str],
) -> None:
    """Log a warning if a pattern of ``train`` matches only weights that are trained anyway.

    The user may believe that nothing else is trained.
    """
    special = {value.name for value in graph.inputs if CHOSEN in value.metadata_props}
    special |= {name for pattern in freeze for name in find_matches(pattern, weights, "--freeze")}
    special |= set(scalings)
    for pattern in train:
        found = find_matches(pattern, weights, "--train")
        if found and not found & special:
            _log.warning(
                "--train %s has no effect: %s would be trained without it; to train nothing else, "
                "add --freeze %s",
                pattern,
                list_some(sorted(found)),
                EVERYTHING,
            )


def pin_names(names: Collection[str]) -> tuple[str, ...]:
    """For each name, return a regular expression that matches only that name."""
    return tuple(f"^{re.escape(name)}$" for name in names)


def make_pattern(names: Sequence[str]) -> str:
    """Return a regular expression that matches the given names and no others."""
    escaped = [re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", name) for name in names]
    return f"^{escaped[0]}$" if len(escaped) == 1 else f"^({'|'.join(escaped)})$"


def read_array(tensor: ir.TensorProtocol) -> np.ndarray:
    """Return a weight as a contiguous little-endian array.

    If the tensor is memory-mapped from a file, the array is memory-mapped as well.
    """
    array = tensor.numpy()
    return np.ascontiguousarray(array).reshape(
        array.shape
    )  # ascontiguousarray turns a scalar into a vector


def list_stored(graph: ir.Graph) -> Iterator[tuple[str, tuple[ir.Value, ir.TensorProtocol]]]:
    """Yield every stored tensor of the graph itself, by name."""
    for name, value in graph.initializers.items():
        if value.const_value is not None:
            yield name, (value, value.const_value)
    for node in graph:
        if node.op_type == "Constant" and not node.domain and "sparse_value" not in node.attributes:
            value = node.outputs[0]
            tensor = ir.convenience.get_const_tensor(value)
            if tensor is not None and value.name and not value.is_graph_output():
                yield value.name, (value, tensor)


def list_constants(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Yield the stored tensors that are not trained, but would be if the user named them."""
    for _, (value, tensor) in list_stored(graph):
        if _classify(value, tensor).kind is TensorKind.CONSTANT:
            yield value, tensor


def _classify(value: ir.Value, tensor: ir.TensorProtocol) -> Classification:
    if tensor.dtype not in _FLOATS:
        return Classification(
            kind=TensorKind.SETTING, reason=f"it is {tensor.dtype}, which has no gradient"
        )
    return classify_tensor(value, tensor)


def _find_trained(
    pattern: str, classified: Mapping[str, Classification], graph: ir.Graph
) -> set[str]:
    found = find_matches(pattern, classified, "--train")
    for kind in (TensorKind.PARAMETER, TensorKind.CONSTANT):
        chosen = {name for name in found if classified[name].kind is kind}
        if chosen:
            return chosen
    for name in classified:
        if name in found:
            raise UnsupportedModel(f"--train {pattern}", f"'{name}': {classified[name].reason}")
    for holder, body in _list_bodies(graph):
        for name, (value, tensor) in list_stored(body):
            if re.search(pattern, name):
                reason = _classify(value, tensor).reason or "the body returns it as it is"
                where = f"'{name}' in a body of node '{holder.name}' ({holder.op_type})"
                raise UnsupportedModel(f"--train {pattern}", f"{where}: {reason}")
    raise refuse_unknown("--train", pattern, classified)


def _list_bodies(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Graph]]:
    """Yield every body in the graph, also nested ones, with the outermost node that contains it."""
    for holder in graph:
        for body in list_bodies(holder):
            yield holder, body
            yield from ((holder, inner) for _, inner in _list_bodies(body))


def _hoist(graph: ir.Graph, train: Sequence[str]) -> None:
    """Move parameters from bodies to the main graph; the bodies then capture them.

    Constants are moved as well if a pattern in ``train`` matches them and no parameter.
    """
    bodies = list(_list_bodies(graph))
    everywhere = [stored for each in (graph, *(body for _, body in bodies))
                  for stored in list_stored(each)]  # fmt: skip
    learned = {name for name, stored in everywhere if _classify(*stored).kind is _PARAMETER}
    patterns = [each for each in train if not find_matches(each, learned, "--train")]
    made = Counter(value.name for node in list_nodes(graph) for value in node.outputs)
    taken = {*made, *(value.name for value in graph.inputs), *graph.initializers}
    for holder, body in bodies:
        for name, (value, tensor) in list(list_stored(body)):
            kind = _classify(value, tensor).kind
            if kind is TensorKind.CONSTANT and any(
                find_matches(pattern, [name], "--train") for pattern in patterns
            ):
                kind = _PARAMETER
            if value.is_graph_output() or kind is not _PARAMETER:
                continue
            is_own = value.producer() is not None and made[name] == 1  # of a Constant node
            own = name if is_own or name not in taken else f"{holder.name}/{name}"
            for number in count(2):
                if own not in taken or is_own:
                    break
                own = f"{holder.name}/{name}_{number}"
            taken.add(own)
            outer = ir.Value(
                name=own, const_value=tensor, metadata_props={INNER: holder.name or ""}
            )
            value.replace_all_uses_with(outer)
            node = value.producer()
            if node is None:
                body.initializers.pop(name)
            else:
                body.remove(node, safe=True)
            graph.register_initializer(outer)


def find_matches(pattern: str, names: Collection[str], option: str) -> set[str]:
    """Return the names that match a regular expression, which is the value of ``option``.

    Raises:
        UsageError: ``pattern`` is not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{option} {pattern} is not a regular expression: {error}") from error
    return {name for name in names if compiled.search(name)}


def refuse_unknown(option: str, pattern: str, names: Collection[str]) -> UnsupportedModel:
    """Return the error for a regular expression that finds none of the names there are."""
    nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
    offer = f"did you mean {quote(nearest)}?" if nearest else f"it has {list_some(names)}"
    return UnsupportedModel(f"{option} {pattern}", "no parameter's name fits this pattern", offer)


def _lift(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    name, node = value.name or "", value.producer()
    if node is None:
        graph.initializers.pop(name)
        value.const_value = None
        source = value
    else:
        source = ir.Value(name=name, metadata_props=dict(value.metadata_props))
        value.replace_all_uses_with(source)
        graph.remove(node, safe=True)
    source.type = ir.TensorType(tensor.dtype)
    source.shape = ir.Shape(tensor.shape.numpy())
    graph.inputs.append(source)
    return tensor
