"""A model that grows node by node, evaluated at two batch sizes as it does."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from onnx import TensorProto, helper, numpy_helper

from tests.support.oracles import make_evaluator

BATCHES = (2, 3)
"""The batch sizes at which each tensor is known; an extent that differs depends on the batch."""
MOST_ELEMENTS = 1500
LARGEST = 300.0
"""Larger numbers are not drawn further: their rounding would hide differences."""

T = TypeVar("T")


class Unfit(Exception):
    """Raised if an operator cannot be applied here; what it added so far is taken back."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Value:
    """A tensor of the model: its name, and its contents at each of ``BATCHES``."""

    name: str
    arrays: tuple[np.ndarray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape at the first batch size."""
        return tuple(self.arrays[0].shape)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def fixed(self) -> list[int]:
        """The axes whose extent does not depend on the batch."""
        first, second = (array.shape for array in self.arrays)
        return [axis for axis in range(len(first)) if first[axis] == second[axis]]

    @property
    def is_float(self) -> bool:
        return self.arrays[0].dtype == np.float32

    @property
    def is_batch_first(self) -> bool:
        """Whether the batch is the first axis, and nothing else depends on it."""
        firsts = tuple(array.shape[0] for array in self.arrays) if self.rank else ()
        return firsts == BATCHES and self.fixed == list(range(1, self.rank))

    def need_fixed(self, *axes: int) -> None:
        """Check that extents do not depend on the batch."""
        if any(axis % self.rank not in self.fixed for axis in axes):
            raise Unfit


class GraphBuilder:
    """A model in the making."""

    def __init__(self, draw: DrawFn, opset: int) -> None:
        self.draw, self.opset = draw, opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.inputs: list[Value] = []
        self.limits: dict[str, int] = {}
        """Integer inputs by name, and the number below which they are drawn."""
        self.values: list[Value] = []
        self.known: list[Value] = []
        """Weights that are used as they are, to be used again."""
        self._count = 0

    # --- drawing ---------------------------------------------------------------------------------

    def pick(self, options: Sequence[T]) -> T:
        """Draw one of some options; the first is the simplest."""
        if not options:
            raise Unfit
        return self.draw(st.sampled_from(options))

    def number(self, least: int, most: int) -> int:
        """Draw an integer, both limits included."""
        if most < least:
            raise Unfit
        return self.draw(st.integers(least, most))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def axis(self, value: Value, *, fixed: bool = False, least: int = 0) -> int:
        """Draw an axis, counted from the front or from the back."""
        axes = [a for a in (value.fixed if fixed else range(value.rank)) if a >= least]
        if not axes:
            raise Unfit
        axis = self.pick(axes)
        return axis - value.rank if self.flag() else axis

    def order(self, count: int) -> list[int]:
        """Draw an order of axes."""
        return self.draw(st.permutations(range(count)))

    def value(self, *, least_rank: int = 0, most_rank: int = 6) -> Value:
        """Draw a float tensor that the model has, mostly a late one."""
        fitting = [v for v in self.values if v.is_float and least_rank <= v.rank <= most_rank]
        if not fitting:
            raise Unfit
        return fitting[-1] if self.pick([True, True, True, False]) else self.pick(fitting[::-1])

    def depends(self, value: Value) -> bool:
        """Check whether a tensor is computed from the model's inputs."""
        reached = {given.name for given in self.inputs}
        for node in self.nodes:
            bodies = [inner for attribute in node.attribute for inner in attribute.g.node]
            if reached & {name for each in (node, *bodies) for name in each.input}:
                reached.update(node.output)
        return value.name in reached and value not in self.inputs

    # --- growing ---------------------------------------------------------------------------------

    def name(self, start: str) -> str:
        self._count += 1
        return f"{start}{self._count}"

    def input(self, dtype: Any, shape: Sequence[int], limit: int = 0) -> Value:
        """Add an input with a batch axis before ``shape``; integers are below ``limit``."""
        if len(self.inputs) >= 4:
            raise Unfit
        name = self.name("x")
        arrays = tuple(
            draw_input(np.random.default_rng(self._count), dtype, (batch, *shape), limit)
            for batch in BATCHES
        )
        self.inputs.append(Value(name=name, arrays=arrays))
        if limit:
            self.limits[name] = limit
        return self.inputs[-1]

    def store(self, array: np.ndarray, start: str = "c") -> Value:
        """Add an initializer."""
        name = self.name(start)
        self.weights.append(numpy_helper.from_array(array, name))
        return Value(name=name, arrays=(array, array))

    def constant(self, array: Any, dtype: Any = np.int64) -> Value:
        """Add a constant, as an initializer or as a node."""
        array = np.asarray(array, dtype)
        if self.flag():
            return self.store(array)
        return self.add("Constant", [], value=numpy_helper.from_array(array))

    def weight(self, *shape: int, scale: float = 0.7, low: float | None = None) -> Value:
        """Add a weight, used as it is or after nodes that only restate it.

        With ``low`` its numbers are above it.
        """
        if math.prod(shape) > MOST_ELEMENTS:
            raise Unfit
        random = np.random.default_rng(100 + self._count)
        array = random.standard_normal(shape).astype(np.float32) * np.float32(scale)
        if low is not None:
            array = np.abs(array) + np.float32(low)
        way = self.pick(
            ["plain"] * 5
            + ["again", "constant", "identity", "transposed", "reshaped", "cast", "scaled", "same"]
        )
        if way == "again" and low is None:
            same = [weight for weight in self.known if weight.shape == shape]
            if same:
                return self.pick(same)
        if way == "constant":
            return self.add("Constant", [], value=numpy_helper.from_array(array))
        if way == "identity":
            return self.add("Identity", [self.store(array, "w")])
        if way == "same" and shape:
            return self.add("Transpose", [self.store(array, "w")], perm=list(range(len(shape))))
        if way == "transposed" and shape:
            perm = self.order(len(shape))
            stored = np.ascontiguousarray(array.transpose(np.argsort(perm)))
            return self.add("Transpose", [self.store(stored, "w")], perm=perm)
        if way == "reshaped":
            return self.add(
                "Reshape", [self.store(array.reshape(-1), "w"), self.constant(list(shape))]
            )
        if way == "cast":
            return self.add(
                "Cast", [self.store(array.astype(np.float64), "w")], to=TensorProto.FLOAT
            )
        if way == "scaled" and low is None:
            return self.add("Mul", [self.store(array, "w"), self.constant(0.5, np.float32)])
        self.known.append(self.store(array, "w"))
        return self.known[-1]

    def unsqueeze(self, value: Value, axes: Sequence[int]) -> Value:
        """Add axes of extent 1."""
        if self.opset >= 13:
            return self.add("Unsqueeze", [value, self.constant(axes)])
        return self.add("Unsqueeze", [value], axes=axes)

    def add(self, op: str, inputs: Sequence[Value | None], **attributes: Any) -> Value:
        """Add a node with one output."""
        return self.add_several(op, inputs, 1, **attributes)[0]

    def add_several(
        self,
        op: str,
        inputs: Sequence[Value | None],
        outputs: int,
        *,
        outer: Sequence[Value] = (),
        **attributes: Any,
    ) -> list[Value]:
        """Add a node with several outputs, and evaluate it; its bodies read ``outer``."""
        names = [self.name("t") for _ in range(outputs)]
        node = helper.make_node(
            op, ["" if i is None else i.name for i in inputs], names, name=self.name("n"),
            **{name: held for name, held in attributes.items() if held is not None},
        )  # fmt: skip
        given = [value for value in (*inputs, *outer) if value is not None]
        found = [
            evaluate([node], {v.name: v.arrays[at] for v in given}, names, self.opset)
            for at in range(len(BATCHES))
        ]
        self.nodes.append(node)
        made = [
            Value(name=name, arrays=(first, second))
            for name, first, second in zip(names, *found, strict=True)
        ]
        for value in made:
            _check(value)
        return made


def _check(value: Value) -> None:
    for array in value.arrays:
        if array.size == 0 or array.size > MOST_ELEMENTS or array.ndim > 6:
            raise Unfit
        if array.dtype.kind == "f" and not (np.abs(array) < LARGEST).all():
            raise Unfit
    if value.arrays[0].ndim != value.arrays[1].ndim:
        raise Unfit


def evaluate(
    nodes: Sequence[onnx.NodeProto], feeds: dict[str, np.ndarray], names: Sequence[str], opset: int
) -> list[np.ndarray]:
    """Evaluate nodes by onnx's own evaluator.

    Raises:
        Unfit: it does not take them.
    """
    graph = helper.make_graph(
        nodes,
        "builder",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in feeds.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in names],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            results = make_evaluator(model).run(None, feeds)
    except Exception as error:  # onnx's evaluator raises all kinds
        raise Unfit(f"{nodes[0].op_type}: {error}") from error
    assert isinstance(results, list)
    return [np.asarray(result) for result in results]


def draw_input(
    random: np.random.Generator, dtype: Any, shape: Sequence[int], limit: int
) -> np.ndarray:
    """Draw the data of an input."""
    if np.dtype(dtype).kind == "b":
        return random.random(shape) < 0.5
    if np.dtype(dtype).kind == "i":
        return random.integers(0, limit, shape).astype(dtype)
    return random.standard_normal(shape).astype(dtype)
