"""The cells of recurrences: one step of each against its formula in numpy, and their functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.rewrites.cells import (
    Cell,
    Function,
    read_functions,
    step_gru,
    step_linear_gru,
    step_lstm,
    step_rnn,
)

DOUBLE = ir.DataType.DOUBLE
BATCH, HIDDEN = 2, 3
Values = Mapping[str, ir.Value]
TANH, SIGMOID = Function(kind="tanh"), Function(kind="sigmoid")


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def draw(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape) for name, shape in shapes.items()}


def run(
    write: Callable[[NodeBuilder, Values], tuple[ir.Value, ...]], arrays: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    values = {
        n: ir.Value(name=n, type=ir.TensorType(DOUBLE), shape=ir.Shape(a.shape))
        for n, a in arrays.items()
    }
    builder = NodeBuilder("cell")
    made = [builder.op("Identity", value) for value in write(builder, values)]
    graph = ir.Graph(
        [*values.values()], made, nodes=builder.nodes, opset_imports={"": 18}, name="cell"
    )
    found = ReferenceEvaluator(ir.to_proto(ir.Model(graph, ir_version=9))).run(None, dict(arrays))
    return [np.asarray(array) for array in found]


def hold(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_of_an_rnn(clip: float | None) -> None:
    arrays = draw(x=(BATCH, HIDDEN), h=(BATCH, HIDDEN), r=(HIDDEN, HIDDEN))

    def write(builder: NodeBuilder, v: Values) -> tuple[ir.Value, ...]:
        cell = Cell(hidden=HIDDEN, functions=[TANH], recurrent=v["r"], dtype=DOUBLE, clip=clip)
        return step_rnn(builder, cell, [v["x"]], (v["h"],))

    pre = arrays["x"] + arrays["h"] @ arrays["r"].T
    pre = pre if clip is None else np.clip(pre, -clip, clip)
    hold(run(write, arrays)[0], np.tanh(pre))


def test_a_step_of_a_gru_resets_before_the_linear_map() -> None:
    arrays = draw(gates=(BATCH, 2 * HIDDEN), x=(BATCH, HIDDEN), h=(BATCH, HIDDEN),
                  rg=(2 * HIDDEN, HIDDEN), rh=(HIDDEN, HIDDEN))  # fmt: skip

    def write(builder: NodeBuilder, v: Values) -> tuple[ir.Value, ...]:
        cell = Cell(hidden=HIDDEN, functions=[SIGMOID, TANH], recurrent=v["rh"], dtype=DOUBLE,
                    parts=[v["rg"], v["rh"]])  # fmt: skip
        return step_gru(builder, cell, [v["gates"], v["x"]], (v["h"],))

    h = arrays["h"]
    z, r = np.split(sigmoid(arrays["gates"] + h @ arrays["rg"].T), 2, axis=1)
    new = np.tanh(arrays["x"] + (r * h) @ arrays["rh"].T)
    hold(run(write, arrays)[0], (1 - z) * new + z * h)


def test_a_step_of_a_linear_gru_resets_behind_it() -> None:
    arrays = draw(gates=(BATCH, 2 * HIDDEN), x=(BATCH, HIDDEN), h=(BATCH, HIDDEN),
                  r=(3 * HIDDEN, HIDDEN), b=(3 * HIDDEN,))  # fmt: skip

    def write(builder: NodeBuilder, v: Values) -> tuple[ir.Value, ...]:
        cell = Cell(hidden=HIDDEN, functions=[SIGMOID, TANH], recurrent=v["r"], dtype=DOUBLE,
                    bias=v["b"])  # fmt: skip
        return step_linear_gru(builder, cell, [v["gates"], v["x"]], (v["h"],))

    h = arrays["h"]
    mapped = h @ arrays["r"].T + arrays["b"]
    z, r = np.split(sigmoid(arrays["gates"] + mapped[:, : 2 * HIDDEN]), 2, axis=1)
    new = np.tanh(arrays["x"] + r * mapped[:, 2 * HIDDEN :])
    hold(run(write, arrays)[0], (1 - z) * new + z * h)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("peepholes", [False, True])
def test_a_step_of_an_lstm(coupled: bool, peepholes: bool) -> None:
    rows = (3 if coupled else 4) * HIDDEN
    arrays = draw(x=(BATCH, rows), h=(BATCH, HIDDEN), c=(BATCH, HIDDEN), r=(rows, HIDDEN))
    if peepholes:
        arrays |= draw(pi=(HIDDEN,), po=(HIDDEN,), pf=(HIDDEN,))

    def write(builder: NodeBuilder, v: Values) -> tuple[ir.Value, ...]:
        cell = Cell(
            hidden=HIDDEN, functions=[SIGMOID, TANH, TANH], recurrent=v["r"], dtype=DOUBLE,
            coupled=coupled, peepholes=[v[p] for p in ("pi", "po", "pf")] if peepholes else (),
        )  # fmt: skip
        return step_lstm(builder, cell, [v["x"]], (v["h"], v["c"]))

    c = arrays["c"]
    gates = np.split(arrays["x"] + arrays["h"] @ arrays["r"].T, rows // HIDDEN, axis=1)
    opening, out, *forgetting, block = gates
    if peepholes:
        opening = opening + arrays["pi"] * c
        forgetting = [gate + arrays["pf"] * c for gate in forgetting]
    i = sigmoid(opening)
    f = 1 - i if coupled else sigmoid(forgetting[0])
    memory = f * c + i * np.tanh(block)
    o = sigmoid(out + (arrays["po"] * memory if peepholes else 0))
    hidden, kept = run(write, arrays)
    hold(kept, memory)
    hold(hidden, o * np.tanh(memory))


FUNCTIONS: list[tuple[str, tuple[float, ...], Callable[[np.ndarray], np.ndarray]]] = [
    ("relu", (), lambda x: np.maximum(x, 0)),
    ("softsign", (), lambda x: x / (1 + np.abs(x))),
    ("softplus", (), lambda x: np.log1p(np.exp(x))),
    ("affine", (2.0, 0.5), lambda x: 2 * x + 0.5),
    ("scaledtanh", (1.5, 0.5), lambda x: 1.5 * np.tanh(0.5 * x)),
    ("elu", (0.7,), lambda x: np.where(x < 0, 0.7 * np.expm1(x), x)),
    ("leakyrelu", (0.2,), lambda x: np.where(x < 0, 0.2 * x, x)),
    ("hardsigmoid", (0.3, 0.4), lambda x: np.clip(0.3 * x + 0.4, 0, 1)),
    ("thresholdedrelu", (0.6,), lambda x: np.where(x > 0.6, x, 0)),
]


@pytest.mark.parametrize(("kind", "settings", "expected"), FUNCTIONS, ids=lambda v: str(v)[:20])
def test_a_function_is_its_formula(
    kind: str, settings: tuple[float, ...], expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    arrays = draw(x=(4, 5))
    function = Function(kind=kind, settings=settings)
    (found,) = run(lambda builder, v: (function.apply(builder, v["x"], DOUBLE),), arrays)
    hold(found, expected(arrays["x"]))


def make_node(**attributes: Any) -> ir.Node:
    return ir.node("LSTM", [ir.Value(name="x")], attributes, name="cells")


def test_functions_are_the_defaults_for_every_direction() -> None:
    kinds = [f.kind for f in read_functions(make_node(), ["Sigmoid", "Tanh", "Tanh"], 2)]
    assert kinds == ["sigmoid", "tanh", "tanh"] * 2


def test_settings_are_handed_out_in_order_to_functions_that_take_them() -> None:
    node = make_node(
        activations=["HardSigmoid", "Tanh", "LeakyRelu"],
        activation_alpha=[0.5, 0.25],
        activation_beta=[0.125],
    )
    found = read_functions(node, ["Sigmoid", "Tanh", "Tanh"], 1)
    assert [f.settings for f in found] == [(0.5, 0.125), (), (0.25,)]
    plain = read_functions(make_node(activations=["Elu", "LeakyRelu", "HardSigmoid"]), "abc", 1)
    assert [f.settings for f in plain] == [(1.0,), (0.01,), (0.2, 0.5)]


def test_functions_that_are_unknown_or_too_few_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"'cells' \(LSTM\).*'Wave'"):
        read_functions(make_node(activations=["Wave", "Tanh", "Tanh"]), "abc", 1)
    with pytest.raises(UnsupportedModel, match="2 activations instead of 3"):
        read_functions(make_node(activations=["Tanh", "Tanh"]), "abc", 1)
