"""Low-rank adapters of weights: the note of them in a model, and the sum of weight and adapter.

An adapter of a weight W of shape (in, out) is a pair of small matrices, A of shape (in, r) and B of
shape (r, out).  Wherever ``x @ W`` is computed, the model adds ``((x @ A) * scale) @ B`` to it.  If
the weight is stored transposed, as (out, in), A and B still have these shapes.  A note in the
model's metadata names the weights and their adapters, so that a cut trains the adapters alone.

This module reads the note and folds adapters into their weights.  :mod:`adaptations` adds adapters
to a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel, UsageError, flatten
from splitonnx.names import ADAPTERS
from splitonnx.partitioner.graphs.traversals import list_inputs, map_values, reads_size

PRODUCTS = frozenset({"Gemm", "MatMul"})
"""The operators whose weights can have adapters."""
_PASSING = frozenset({"Identity", "Transpose"})
"""Operators between a stored weight and the product that uses it."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The names of a weight, and of the two matrices A (``first``) and B (``second``)."""

    weight: str
    first: str
    second: str


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a model's metadata say about its adapters.

    ``alpha`` is the scale of all adapters times their rank.  ``changed`` names other weights and
    running statistics that training changed, so that the adapters alone are not all of it.
    """

    alpha: float
    adapters: tuple[Adapter, ...]
    changed: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all matrices that belong to adapters."""
        return tuple(name for one in self.adapters for name in (one.first, one.second))


def read_note(model: ir.Model) -> Note | None:
    """Return the note about a model's adapters, or ``None`` if the model has none.

    Raises:
        UnsupportedModel: the note cannot be read, or names tensors that the model does not have.
    """
    text = model.metadata_props.get(ADAPTERS)
    if text is None:
        return None
    try:
        note = msgspec.json.decode(text, type=Note)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise _refuse_note(f"cannot be read ({flatten(str(error))})") from error
    for name in (*note.names, *note.changed, *(adapter.weight for adapter in note.adapters)):
        if not name.isprintable():
            raise _refuse_note(f"holds the name {name[:80]!a} with control characters")
    known = map_values(model.graph)
    if missing := [name for name in note.names if name not in known]:
        raise _refuse_note(f"names '{missing[0]}', which the model does not have")
    return note


def write_note(model: ir.Model, note: Note) -> None:
    """Note a model's adapters in its metadata."""
    model.metadata_props[ADAPTERS] = msgspec.json.encode(note).decode()


def find_matrix(node: ir.Node) -> tuple[ir.Value | None, bool]:
    """Return the tensor that a product has as its right factor, and whether it is transposed.

    Nodes that only transpose or copy the tensor on its way to the product are passed.
    """
    value = node.inputs[1] if len(node.inputs) > 1 else None
    transposed = node.op_type == "Gemm" and read_integer(node, "transB") != 0
    while value is not None and (passing := value.producer()) is not None:
        if passing.op_type not in _PASSING or passing.domain:
            break
        transposed ^= passing.op_type == "Transpose" and _swaps(passing)
        value = passing.inputs[0]
    return value, transposed


def read_integer(node: ir.Node, name: str) -> int:
    """Return an integer attribute of a node, or 0 if the node does not have it."""
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


def read_factor(node: ir.Node) -> float:
    """Return the number by which a node multiplies its product: Gemm's ``alpha``, otherwise 1."""
    attribute = node.attributes.get("alpha") if node.op_type == "Gemm" else None
    return 1.0 if attribute is None else attribute.as_float()


def _store(value: ir.Value, array: np.ndarray, dtype: ir.DataType) -> None:
    """Replace the numbers of a stored tensor, which an initializer or a Constant node holds."""
    tensor = ir.tensor(array, dtype=dtype, name=value.name)
    node = value.producer()
    if node is None:
        value.const_value = tensor
        return
    for name in list(node.attributes):  # a Constant's attribute may have another name
        node.attributes.pop(name)
    node.attributes["value"] = ir.AttrTensor("value", tensor)


def fold_adapters(model: ir.Model) -> None:
    """Add each adapter to its weight, and remove the adapters' nodes and the note.

    What remains has the nodes that the model had before adapters were added::

        W := W + scale * (A @ B)

    The sum is computed in float64 and rounded once, to the weight's type.

    Raises:
        UsageError: the model has no adapters.
        UnsupportedModel: an adapter is not used as :mod:`adaptations` writes it, or its weight is
            also used without it.
    """
    note = read_note(model)
    if note is None:
        raise UsageError("the model has no adapters to fold; leave out --fold (fold=True)")
    values = map_values(model.graph)
    for adapter in note.adapters:
        _fold(model.graph, adapter, values[adapter.first], values[adapter.second])
    del model.metadata_props[ADAPTERS]


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A product with an adapter.

    ``sum`` adds to the result of ``product`` what the nodes in ``added`` compute, from the last to
    the first.  ``scale`` is the factor of A @ B in the product's terms.
    """

    product: ir.Node
    sum: ir.Node
    added: Sequence[ir.Node]
    scale: float


def _fold(graph: ir.Graph, adapter: Adapter, first: ir.Value, second: ir.Value) -> None:
    places = list(_list_places(adapter, first, second))
    if not places:
        raise _refuse(adapter, "no product uses it")
    found = [find_matrix(place.product) for place in places]
    weight = found[0][0]
    tensor = None if weight is None else ir.convenience.get_const_tensor(weight)
    if weight is None or tensor is None or len(tensor.shape) != 2:
        raise _refuse(adapter, "its weight is not stored as a matrix")
    if len(set(found)) != 1 or len({place.scale for place in places}) != 1:
        raise _refuse(adapter, "its products use it in different ways")
    if _is_used_elsewhere(weight, [place.product for place in places]):
        raise _refuse(
            adapter, f"'{weight.name}' is also used without it, so that use would change as well"
        )
    change = _read(adapter, first) @ _read(adapter, second) * places[0].scale
    array = tensor.numpy()
    change = change.T if found[0][1] else change
    if change.shape != array.shape:
        raise _refuse(adapter, f"A @ B has the shape {change.shape}, its weight {array.shape}")
    _store(weight, (array.astype(np.float64) + change).astype(array.dtype), tensor.dtype)
    for place in places:
        _remove(graph, place)
    for value in (first, second):
        graph.initializers.pop(value.name or "", None)


def _list_places(adapter: Adapter, first: ir.Value, second: ir.Value) -> Iterator[_Place]:
    """Yield the products to whose results an adapter's product is added."""
    for use in first.uses():
        down = _expect(adapter, use.node, "MatMul", first)
        scaled = _expect(adapter, _find_reader(adapter, down), "Mul", None)
        up = _expect(adapter, _find_reader(adapter, scaled), "MatMul", second)
        total = _expect(adapter, _find_reader(adapter, up), "Add", None)
        product = next((v.producer() for v in total.inputs if v and v is not up.outputs[0]), None)
        if product is None or product.op_type not in PRODUCTS or product.domain:
            raise _refuse(adapter, f"node '{total.name}' does not add it to a product")
        if not _reads_alone(product, total) or product.inputs[0] is not down.inputs[0]:
            raise _refuse(adapter, f"it does not read what node '{product.name}' reads")
        number = ir.convenience.get_const_tensor(scaled.inputs[1]) if scaled.inputs[1] else None
        if number is None or number.size != 1:
            raise _refuse(adapter, f"node '{scaled.name}' does not scale it by a number")
        scale = float(number.numpy().reshape(())) / (read_factor(product) or 1.0)
        yield _Place(product=product, sum=total, added=(up, scaled, down), scale=scale)


def _expect(adapter: Adapter, node: ir.Node, kind: str, right: ir.Value | None) -> ir.Node:
    reads = len(node.inputs) == 2 and (right is None or node.inputs[1] is right)
    if node.op_type != kind or node.domain or not reads:
        raise _refuse(adapter, f"node '{node.name}' ({node.op_type}) is not the expected {kind}")
    return node


def _find_reader(adapter: Adapter, node: ir.Node) -> ir.Node:
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        raise _refuse(adapter, f"the result of node '{node.name}' is used elsewhere")
    return uses[0].node


def _reads_alone(product: ir.Node, total: ir.Node) -> bool:
    """Return whether nothing but ``total`` reads the result of ``product``."""
    result = product.outputs[0]
    return not result.is_graph_output() and {use.node for use in result.uses()} == {total}


def _is_used_elsewhere(value: ir.Value, products: Sequence[ir.Node]) -> bool:
    """Return whether another node than ``products`` reads the numbers of a stored matrix."""
    if value.is_graph_output():
        return True
    for use in value.uses():
        node = use.node
        if node.op_type in _PASSING and not node.domain and use.idx == 0:
            if _is_used_elsewhere(node.outputs[0], products):
                return True
        elif not reads_size(node) and (use.idx != 1 or node not in products):
            return True
    return False


def _swaps(node: ir.Node) -> bool:
    """Return whether a Transpose of a matrix exchanges its two axes."""
    permutation = node.attributes.get("perm")
    return permutation is None or list(permutation.as_ints()) == [1, 0]


def _read(adapter: Adapter, value: ir.Value) -> np.ndarray:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or len(tensor.shape) != 2:
        raise _refuse(adapter, f"'{value.name}' is not stored as a matrix")
    return tensor.numpy().astype(np.float64)


def _remove(graph: ir.Graph, place: _Place) -> None:
    """Remove an adapter's nodes; the product's result gets back the name of the sum."""
    total, result = place.sum.outputs[0], place.product.outputs[0]
    name = total.name
    total.replace_all_uses_with(result, replace_graph_outputs=True)
    held = [value for node in place.added for value in list_inputs(node)]
    graph.remove([place.sum, *place.added], safe=True)
    result.name = name
    for value in held:
        if value.is_initializer() and not value.uses():
            graph.initializers.pop(value.name or "", None)


def _refuse(adapter: Adapter, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the adapter of '{adapter.weight}'", reason, "so it cannot be folded; leave out --fold"
    )


def _refuse_note(reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the note '{ADAPTERS}' in the model's metadata",
        reason,
        "the model was changed since splitonnx adapt wrote it; adapt it again",
    )
