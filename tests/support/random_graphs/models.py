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
from tests.support.random_graphs.drafts import BATCHES, DrawnModel, Unfit, Value, draw_input

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
    draft = DrawnModel(draw, draw(st.sampled_from(OPSETS)))
    shapes = [draft.pick(SHAPES)]
    if draft.flag():
        shapes.append(shapes[0] if draft.flag() else draft.pick(SHAPES))
    draft.values = [draft.input(np.float32, shape) for shape in shapes]
    _grow(draft, [layers.draw_scale, layers.draw_matmul, layers.draw_convolution])
    for _ in range(draft.number(1, MOST_OPERATORS - 1)):
        _grow(draft, draft.pick(GROUPS))
    if draft.pick([True, True, True, False]):
        _grow(draft, [layers.draw_end])
    assume(len(draft.nodes) >= 2)
    outputs, output = _draw_outputs(draft)
    loss = "mse"
    if draft.pick([False, False, False, True]):
        loss = "from-model"
        try:
            output = rarities.draw_loss(draft, output)
        except Unfit:
            assume(False)
        outputs = [output, *outputs]
    weights = {tensor.name for tensor in draft.weights}
    graph = helper.make_graph(
        draft.nodes,
        "drawn",
        [_declare(value) for value in draft.inputs],
        [_declare(value) for value in outputs],
        draft.weights,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", draft.opset)],
        ir_version=draft.pick([8, 9, 10] if draft.opset < 20 else [9, 10]),
    )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        assume(False)  # such as an operator that this opset lacks
    assume(any(v.is_float and v.name not in weights for v in outputs))
    return Drawn(
        model=model,
        limits=draft.limits,
        output=output.name,
        loss=loss,
        at=draft.draw(st.one_of(st.none(), st.integers(0, 7), st.integers(0, 7))),
        portable=(draft.flag(), draft.flag()),
    )


def _grow(draft: DrawnModel, among: Sequence[Callable[[DrawnModel], Sequence[Value]]]) -> None:
    """Add an operator, or nothing if the one drawn does not fit."""
    before = len(draft.nodes), len(draft.weights), len(draft.inputs), len(draft.known)
    grow = draft.pick(among)
    try:
        draft.values += grow(draft)
    except Unfit:
        nodes, weights, inputs, known = before
        del draft.nodes[nodes:], draft.weights[weights:], draft.inputs[inputs:], draft.known[known:]


def _draw_outputs(draft: DrawnModel) -> tuple[list[Value], Value]:
    """Draw outputs, and the one for the loss: the last tensor, sometimes others before it."""
    made = [v for v in draft.values[::-1] if v.is_float and draft.depends(v)]
    assume(bool(made))
    last = made[0]
    outputs = [last]
    for _ in range(draft.pick([0, 0, 0, 1, 2])):
        held = [*made, *(v for v in draft.inputs if draft.opset >= 13), *draft.known]
        other = draft.pick(held)
        if other not in outputs:
            outputs.insert(draft.number(0, len(outputs)), other)
    return outputs, last


def _declare(value: Value) -> onnx.ValueInfoProto:
    first, second = (array.shape for array in value.arrays)
    dims = [
        one if one == two else "N" if (one, two) == BATCHES else None
        for one, two in zip(first, second, strict=True)
    ]
    kind = helper.np_dtype_to_tensor_dtype(value.arrays[0].dtype)
    return helper.make_tensor_value_info(value.name, kind, dims)
