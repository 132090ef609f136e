"""Infer the shapes of a model's tensors, and the contents of small tensors, without any data.

onnx's own inference loses an unknown dimension as soon as the model does arithmetic with it.  This
module keeps track of it as a :class:`dimensions.Dim`, even if it is an element of an integer
tensor, and can therefore follow a chain of Shape, Gather, Concat and Reshape.  Nodes are not
changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from splitonnx.partitioner.inference.dimensions import (
    Amount,
    Dim,
    Undecided,
    add,
    bound,
    divide_rounding,
    is_equal,
    is_less,
    multiply,
    name_unknown,
    parse_dim,
    prod_of,
    sum_of,
    take_remainder,
)
from splitonnx.partitioner.inference.evaluations import Schemas, evaluate
from splitonnx.partitioner.inference.node_faults import attribute_errors_to
from splitonnx.partitioner.inference.shape_rules import RULES, Dims

MOST_ELEMENTS = 1 << 16
"""Limit of elements in a folded constant; every stage that uses a constant has to store it."""
_MOST_SYMBOLS = 1 << 10
_MOST_COMPUTED = 1 << 17
"""Limit of elements of symbolic contents computed in one graph; further contents are unknown."""

_MOVING = frozenset(
    ["Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape",
     "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"]
)  # fmt: skip
"""Operators that only move or copy elements, so that elements may also be symbols."""

_COMPUTING = frozenset(
    ["Abs", "Add", "And", "Cast", "Ceil", "Clip", "ConstantOfShape", "Div", "Equal", "Exp", "Floor",
     "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mod",
     "Mul", "Neg", "NonZero", "Not", "Or", "Pow", "Range", "Reciprocal", "ReduceMax", "ReduceMin",
     "ReduceProd", "ReduceSum", "Round", "Shape", "Sign", "Size", "Sqrt", "Sub", "Trilu", "Where",
     "Xor"]
)  # fmt: skip
FOLDABLE = _MOVING | _COMPUTING
"""Operators whose outputs are computed if all of their inputs are constants."""


def _unless(rule: Callable[[Amount, Amount], bool]) -> Callable[[Amount, Amount], bool]:
    return lambda left, right: not rule(left, right)


def _choose(condition: bool, left: Amount, right: Amount) -> Amount:
    return left if condition else right


_ARITHMETIC: Mapping[str, tuple[int, Callable[..., Any]]] = {
    "Add": (2, add),
    "And": (2, lambda left, right: left and right),
    "Div": (2, divide_rounding),
    "Equal": (2, is_equal),
    "Greater": (2, lambda left, right: is_less(right, left)),
    "GreaterOrEqual": (2, _unless(is_less)),
    "Less": (2, is_less),
    "LessOrEqual": (2, _unless(lambda left, right: is_less(right, left))),
    "Max": (2, lambda left, right: right if is_less(left, right) else left),
    "Min": (2, lambda left, right: left if is_less(left, right) else right),
    "Mod": (2, take_remainder),
    "Mul": (2, multiply),
    "Neg": (1, lambda value: bound(-value)),
    "Not": (1, lambda value: not value),
    "Or": (2, lambda left, right: left or right),
    "Sub": (2, lambda left, right: bound(left - right)),
    "Where": (3, _choose),
}
"""Map elementwise operators to their number of inputs and their function for amounts."""


_Shapes = Sequence[Sequence[Amount | None] | None]


class Inference:
    """The inferred shapes and contents of a graph's values.

    Call :meth:`visit` for each node in topological order.  For a value that no visited node
    computes, the declared shape is used, and the content is known only if it is a small constant.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self._shapes: dict[ir.Value, Dims] = {}
        self._contents: dict[ir.Value, np.ndarray | None] = {}
        self._written: dict[str, Amount] = {}
        self._schemas = Schemas(opset)
        self._noted: dict[tuple[int | str, ...], ir.Shape] = {}
        self._computed = 0

    def shape(self, value: ir.Value) -> Dims | None:
        """Return a value's dimensions, or ``None`` if their number is not known."""
        if value in self._shapes:
            return self._shapes[value]
        if value.shape is not None:
            self._shapes[value] = [
                dim if isinstance(dim, int) else self._read(dim.value, value, axis)
                for axis, dim in enumerate(value.shape)
            ]
        elif (content := self.content(value)) is not None:
            self._shapes[value] = list(content.shape)
        return self._shapes.get(value)

    def content(self, value: ir.Value | None) -> np.ndarray | None:
        """Return a value's elements, or ``None`` if they are not known.

        The result is an array of numbers, or of objects if any element is a Dim.
        """
        if value is None:
            return None
        if value not in self._contents:
            self._contents[value] = self._read_constant(value)
        return self._contents[value]

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """Return a value's elements, or ``None`` if any element is not a known number."""
        content = self.content(value)
        return None if content is None or content.dtype == object else content

    def visit(self, node: ir.Node) -> None:
        """Infer and store the shapes and contents of a node's outputs.

        Raises:
            UnsupportedModel: the node's inputs or attributes are not valid for its operator.
        """
        if node.op_type == "Constant" or node.domain not in ("", "ai.onnx"):
            return
        with attribute_errors_to(node, "asked for its shapes"):
            self._learn(node)

    def _learn(self, node: ir.Node) -> None:
        shapes = self._infer(node)
        for index, value in enumerate(node.outputs):
            if index < len(shapes) and (dims := shapes[index]) is not None:
                self._shapes[value] = self._complete(value, dims)
        contents = self._compute(node)
        for value, content in zip(node.outputs, contents, strict=False):
            self._contents[value] = content
            if content is not None:
                self._shapes[value] = list(content.shape)

    def note(self, value: ir.Value) -> None:
        """Store the inferred shape of a value, if there is one, on the value itself."""
        dims = self._shapes.get(value)
        if dims is not None:
            written = tuple(d if isinstance(d, int) else str(d) for d in dims)
            if written not in self._noted:
                self._noted[written] = ir.Shape(written)
            value.shape = self._noted[written]

    def write(self, dim: Amount) -> int | str:
        """Return a dimension as onnx stores it: a number, or a text that can be parsed again."""
        if isinstance(dim, Dim):
            self._written[str(dim)] = dim
            return str(dim)
        return dim

    def _read(self, text: str | None, value: ir.Value, axis: int) -> Amount:
        if text is None or not text:
            return name_unknown(value.name or "", axis)
        return self._written.get(text) or parse_dim(text)

    def _complete(self, value: ir.Value, dims: Sequence[Amount | None]) -> Dims:
        """Replace unknown dimensions by declared ones, or by new atoms if none are declared.

        Declared numbers take precedence over inferred dimensions.
        """
        noted: list[Any] = list(value.shape) if value.shape is not None else []
        if len(noted) != len(dims):
            noted = [None] * len(dims)
        full: Dims = []
        for axis, (dim, old) in enumerate(zip(dims, noted, strict=True)):
            if isinstance(old, int):
                full.append(old)
            elif dim is not None:
                full.append(dim)
            else:
                full.append(self._read(old.value if old is not None else None, value, axis))
        return full

    def _read_constant(self, value: ir.Value) -> np.ndarray | None:
        node, tensor = value.producer(), value.const_value
        if node is None:
            if tensor is None or value.is_graph_input() or tensor.size > MOST_ELEMENTS:
                return None
            return tensor.numpy()
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            return None
        held = node.attributes.get("value")
        if held is not None and held.as_tensor().size > MOST_ELEMENTS:
            return None
        return evaluate(node, [], self.opset)[0]

    def _infer(self, node: ir.Node) -> _Shapes:
        rule = RULES.get(node.op_type)
        if rule is not None:
            try:
                found = rule(self, node)
            except Undecided:
                found = None
            if found is not None and all(value.type is not None for value in node.outputs):
                return found
            return self._ask_schema(node) if found is None else self._name_types(node, found)
        return self._ask_schema(node)

    def _name_types(self, node: ir.Node, found: _Shapes) -> _Shapes:
        """Set missing types of outputs as onnx infers them, but return the shapes in ``found``."""
        self._ask_schema(node)
        return found

    def _ask_schema(self, node: ir.Node) -> _Shapes:
        """Infer a node's output shapes with onnx, with symbols as names, and set missing types."""
        types, data = {}, {}
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            name, dims = f"i{index}", self.shape(value)
            if value.dtype is None or not isinstance(value.type, ir.TensorType):
                return ()
            shape = None if dims is None else tuple(map(self.write, dims))
            types[name] = value.dtype.value, shape
            content = self.constant(value)
            if content is not None and content.dtype.kind in "ifb":
                data[name] = onnx.numpy_helper.from_array(content, name)
        made = self._schemas.infer(node, types, data)
        return [
            self._read_type(value, kind) for value, kind in zip(node.outputs, made, strict=True)
        ]

    def _read_type(
        self, value: ir.Value, made: onnx.TypeProto | None
    ) -> Sequence[Amount | None] | None:
        if made is None or not made.HasField("tensor_type"):
            return None
        if value.type is None and made.tensor_type.elem_type:
            value.type = ir.TensorType(ir.DataType(made.tensor_type.elem_type))
        if not made.tensor_type.HasField("shape"):
            return None
        dims: list[Amount | None] = []
        for dim in made.tensor_type.shape.dim:
            if dim.HasField("dim_value"):
                dims.append(dim.dim_value)
            else:
                name = dim.dim_param
                dims.append((self._written.get(name) or parse_dim(name)) if name else None)
        return dims

    def _compute(self, node: ir.Node) -> Sequence[np.ndarray | None]:
        if node.op_type == "Shape" and node.inputs[0] is not None:
            return [self._read_shape(node)]
        if node.op_type == "Size" and node.inputs[0] is not None:
            return [self._read_size(node.inputs[0])]
        if node.op_type not in FOLDABLE or not node.inputs:
            return ()
        contents = [self.content(value) for value in node.inputs]
        if any(c is None and v is not None for c, v in zip(contents, node.inputs, strict=True)):
            return ()
        if not self._is_small(node, MOST_ELEMENTS):
            return ()
        if not any(content is not None and content.dtype == object for content in contents):
            plain = node.op_type == "Identity"
            return contents if plain else evaluate(node, contents, self.opset)
        self._computed += sum(content.size for content in contents if content is not None)
        if not self._is_small(node, _MOST_SYMBOLS) or self._computed > _MOST_COMPUTED:
            return ()
        try:
            return self._compute_symbols(node, [np.array(c, object) if c is not None else None
                                                for c in contents])  # fmt: skip
        except Undecided:
            return ()

    def _is_small(self, node: ir.Node, most: int) -> bool:
        """Return whether no output of a node has more than ``most`` elements."""
        if node.op_type == "Range" and not self._is_short(node, most):
            return False
        for value in node.outputs:
            dims = self.shape(value)
            if dims is None or prod(max(1, d) for d in dims if isinstance(d, int)) > most:
                return False
        return True

    def _is_short(self, node: ir.Node, most: int) -> bool:
        """Return whether a Range has at most ``most`` elements, or is between symbols."""
        start, limit, delta = (self.constant(value) for value in node.inputs)
        if start is None or limit is None or delta is None:
            return True  # a Range of symbols
        with np.errstate(all="ignore"):
            steps = (float(limit.flat[0]) - float(start.flat[0])) / np.float64(delta.flat[0])
        return bool(steps <= most)  # false if NaN

    def _read_size(self, value: ir.Value) -> np.ndarray | None:
        dims = self.shape(value)
        try:
            return None if dims is None else _as_array(np.array(prod_of(dims), object))
        except Undecided:
            return None

    def _read_shape(self, node: ir.Node) -> np.ndarray | None:
        assert node.inputs[0] is not None
        dims = self.shape(node.inputs[0])
        if dims is None:
            return None
        start, end = node.attributes.get_int("start", 0), node.attributes.get("end")
        piece = dims[start:] if end is None else dims[start : end.as_int()]
        return _as_array(_hold(piece))

    def _compute_symbols(
        self, node: ir.Node, contents: Sequence[np.ndarray | None]
    ) -> Sequence[np.ndarray | None]:
        given = [content for content in contents if content is not None]
        dtype = node.outputs[0].dtype
        if node.op_type == "Cast":
            wanted = ir.DataType(node.attributes.get_int("to"))
            return [given[0]] if wanted in (ir.DataType.INT64, ir.DataType.INT32) else ()
        if node.op_type in _ARITHMETIC:
            if node.inputs[-1] is not None and node.inputs[-1].dtype not in _INTEGERS:
                return ()
            count, function = _ARITHMETIC[node.op_type]
            if len(given) != count:
                return ()
            return [_as_array(np.frompyfunc(function, count, 1)(*given), dtype)]
        if node.op_type in ("ReduceProd", "ReduceSum"):
            return self._reduce(node, given)
        return self._move(node, contents) if node.op_type in _MOVING else ()

    def _reduce(self, node: ir.Node, given: Sequence[np.ndarray]) -> Sequence[np.ndarray | None]:
        if len(given) > 1 or "axes" in node.attributes or given[0].ndim != 1:
            return ()
        total = (prod_of if node.op_type == "ReduceProd" else sum_of)(given[0])
        keep = node.attributes.get_int("keepdims", 1)
        return [_as_array(_hold([total]) if keep else np.array(total, object), node.inputs[0])]

    def _move(
        self, node: ir.Node, contents: Sequence[np.ndarray | None]
    ) -> Sequence[np.ndarray | None]:
        """Compute how an operator moves symbols, by moving their indices in a table instead."""
        count = len(contents) if node.op_type == "Concat" else 1
        if any(_has_symbols(content) for content in contents[count:]):
            return ()
        table: list[Any] = []
        stand_ins: list[np.ndarray | None] = []
        for index, content in enumerate(contents):
            if content is None or index >= count:
                stand_ins.append(None if content is None else content.astype(np.int64))
                continue
            places = np.arange(len(table), len(table) + content.size).reshape(content.shape)
            table.extend(content.reshape(-1))
            stand_ins.append(places)
        moved = evaluate(node, stand_ins, self.opset)
        symbols = _hold(table)
        return [None if m is None else _as_array(_take(symbols, m), node.inputs[0]) for m in moved]


_INTEGERS = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}


def _has_symbols(content: np.ndarray | None) -> bool:
    return content is not None and any(isinstance(element, Dim) for element in content.reshape(-1))


def _hold(amounts: Sequence[Any]) -> np.ndarray:
    held = np.empty(len(amounts), object)
    held[:] = amounts
    return held


def _take(symbols: np.ndarray, places: np.ndarray) -> np.ndarray:
    taken = np.empty(places.shape, object)
    taken[...] = symbols[places]
    return taken


def _as_array(content: Any, kind: ir.Value | ir.DataType | None = None) -> np.ndarray:
    """Return an array of numbers, or an array of objects if any element is a symbol."""
    array = np.asarray(content, object)
    if _has_symbols(array):
        return array
    dtype = kind.dtype if isinstance(kind, ir.Value) else kind
    return array.astype(dtype.numpy() if dtype is not None else np.int64)
