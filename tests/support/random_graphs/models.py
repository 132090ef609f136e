"""Draw whole models: inputs, two to twelve operators, and one to three outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from onnx import helper

from tests.support.random_graphs import elementwise, layers, rarities, reshapes, selections
from tests.support.random_graphs.builders import BATCHES, GraphBuilder, Unfit, Value, draw_input

OPSETS = (18, 21, 20, 19, 17, 16, 15, 13, 12, 11, 9)
SHAPES = ((4,), (3, 4), (4, 5, 6), (2, 4), (6, 3), (2, 4, 4), (1, 6, 5), (2, 3, 4, 3), (5,))
"""Of inputs, after the batch."""
MOST_OPERATORS = 12


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A model, the numbers below which its integer inputs lie, and from what its loss is made."""

    model: onnx.ModelProto
    limits: Mapping[str, int]
    output: str
    loss: str
    at: int | None
    """Which of the tensors that can be cut, counted in cycles; ``None`` leaves the model whole."""
    portable: tuple[bool, bool]

    def data(self, rows: int, seed: int) -> dict[str, np.ndarray]:
        """Draw data for the inputs."""
        random = np.random.default_rng(seed)
        data = {}
        for value in self.model.graph.input:
            tensor = value.type.tensor_type
            dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            shape = [rows, *(dim.dim_value for dim in tensor.shape.dim[1:])]
            data[value.name] = draw_input(random, dtype, shape, self.limits.get(value.name, 0))
        return data


GROUPS = (
    elementwise.DRAWN, layers.DRAWN, elementwise.DRAWN, reshapes.DRAWN, layers.DRAWN,
    reshapes.DRAWN, selections.DRAWN, rarities.DRAWN,
)  # fmt: skip


@st.composite
def models(draw: DrawFn) -> Drawn:
    """Draw a model with a symbolic batch."""
    builder = GraphBuilder(draw, draw(st.sampled_from(OPSETS)))
    shapes = [builder.pick(SHAPES)]
    if builder.flag():
        shapes.append(shapes[0] if builder.flag() else builder.pick(SHAPES))
    builder.values = [builder.input(np.float32, shape) for shape in shapes]
    _grow(builder, [layers.draw_scale, layers.draw_matmul, layers.draw_convolution])
    for _ in range(builder.number(1, MOST_OPERATORS - 1)):
        _grow(builder, builder.pick(GROUPS))
    if builder.pick([True, True, True, False]):
        _grow(builder, [layers.draw_end])
    assume(len(builder.nodes) >= 2)
    outputs, output = _draw_outputs(builder)
    loss = "mse"
    if builder.pick([False, False, False, True]):
        loss = "from-model"
        try:
            output = rarities.draw_loss(builder, output)
        except Unfit:
            assume(False)
        outputs = [output, *outputs]
    weights = {tensor.name for tensor in builder.weights}
    graph = helper.make_graph(
        builder.nodes,
        "drawn",
        [_declare(value) for value in builder.inputs],
        [_declare(value) for value in outputs],
        builder.weights,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", builder.opset)],
        ir_version=builder.pick([8, 9, 10] if builder.opset < 20 else [9, 10]),
    )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        assume(False)  # such as an operator that this opset lacks
    assume(any(v.is_float and v.name not in weights for v in outputs))
    return Drawn(
        model=model,
        limits=builder.limits,
        output=output.name,
        loss=loss,
        at=builder.draw(st.one_of(st.none(), st.integers(0, 7), st.integers(0, 7))),
        portable=(builder.flag(), builder.flag()),
    )


def _grow(
    builder: GraphBuilder, among: Sequence[Callable[[GraphBuilder], Sequence[Value]]]
) -> None:
    """Add an operator, or nothing if the one drawn does not fit."""
    before = len(builder.nodes), len(builder.weights), len(builder.inputs), len(builder.known)
    grow = builder.pick(among)
    try:
        builder.values += grow(builder)
    except Unfit:
        nodes, weights, inputs, known = before
        del (
            builder.nodes[nodes:],
            builder.weights[weights:],
            builder.inputs[inputs:],
            builder.known[known:],
        )


def _draw_outputs(builder: GraphBuilder) -> tuple[list[Value], Value]:
    """Draw outputs, and the one for the loss: the last tensor, sometimes others before it."""
    made = [v for v in builder.values[::-1] if v.is_float and builder.depends(v)]
    assume(bool(made))
    last = made[0]
    outputs = [last]
    for _ in range(builder.pick([0, 0, 0, 1, 2])):
        held = [*made, *(v for v in builder.inputs if builder.opset >= 13), *builder.known]
        other = builder.pick(held)
        if other not in outputs:
            outputs.insert(builder.number(0, len(outputs)), other)
    return outputs, last


def _declare(value: Value) -> onnx.ValueInfoProto:
    first, second = (array.shape for array in value.arrays)
    dims = [
        one if one == two else "N" if (one, two) == BATCHES else None
        for one, two in zip(first, second, strict=True)
    ]
    kind = helper.np_dtype_to_tensor_dtype(value.arrays[0].dtype)
    return helper.make_tensor_value_info(value.name, kind, dims)
