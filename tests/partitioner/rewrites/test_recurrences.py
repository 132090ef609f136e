"""LSTM, GRU and RNN by Scans, against a numpy loop that ONNX Runtime's own kernels agree with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from splitonnx.bundles import Bundle
from splitonnx.errors import UnsupportedModel
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from tests.support.case_trials import STEP, TARGETS, run_step
from tests.support.differentiations import hold_gradients
from tests.support.oracles import differentiate_numerically
from tests.support.zoo import FLOAT, Net

Arrays = Mapping[str, np.ndarray]
Attributes = Mapping[str, Any]
GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}
INPUTS = ["x", "w", "r", "b", "lens", "h", "c", "p"]
DEFAULTS = {
    "GRU": ["Sigmoid", "Tanh"],
    "LSTM": ["Sigmoid", "Tanh", "Tanh"],
    "RNN": ["Tanh"],
}

FUNCTIONS: Mapping[str, tuple[int, Callable[..., np.ndarray]]] = {
    "Affine": (2, lambda x, a, b: a * x + b),
    "Elu": (1, lambda x, a: np.where(x > 0, x, a * np.expm1(x))),
    "HardSigmoid": (2, lambda x, a, b: np.clip(a * x + b, 0, 1)),
    "LeakyRelu": (1, lambda x, a: np.where(x > 0, x, a * x)),
    "Relu": (0, lambda x: np.maximum(x, 0)),
    "ScaledTanh": (2, lambda x, a, b: a * np.tanh(b * x)),
    "Sigmoid": (0, lambda x: 1 / (1 + np.exp(-x))),
    "Softplus": (0, lambda x: np.log1p(np.exp(x))),
    "Softsign": (0, lambda x: x / (1 + np.abs(x))),
    "Tanh": (0, np.tanh),
    "ThresholdedRelu": (1, lambda x, a: np.where(x > a, x, 0)),
}


def evaluate(kind: str, attributes: Attributes, arrays: Arrays) -> dict[str, np.ndarray]:
    """Run a recurrence in numpy: a loop over directions and steps."""
    x, w, r = arrays["x"], arrays["w"], arrays["r"]
    first = attributes.get("layout", 0)
    if first:
        x = x.swapaxes(0, 1)
    steps, batch, _ = x.shape
    directions, size, hidden = len(w), w.shape[1], r.shape[2]
    lens = arrays.get("lens", np.full(batch, steps))
    zero = np.zeros((batch, directions, hidden) if first else (directions, batch, hidden))
    starts = [arrays.get("h", zero), arrays.get("c", zero)]
    if first:
        starts = [start.swapaxes(0, 1) for start in starts]
    y = np.zeros((steps, directions, batch, hidden))
    ends = np.zeros((2, directions, batch, hidden))
    for d in range(directions):
        bias = arrays["b"][d] if "b" in arrays else np.zeros(2 * size)
        apply = _read_functions(kind, attributes, d)
        state = (starts[0][d], starts[1][d])
        backwards = d == 1 or attributes.get("direction") == "reverse"
        for t in range(steps)[:: -1 if backwards else 1]:
            peepholes = arrays["p"][d] if "p" in arrays else np.zeros(3 * hidden)
            new = _step(kind, attributes, apply, x[t] @ w[d].T, r[d], bias, peepholes, state)
            going = (t < lens)[:, None]
            y[t, d] = np.where(going, new[0], 0)
            state = (np.where(going, new[0], state[0]), np.where(going, new[1], state[1]))
        ends[:, d] = state
    if first:
        return {
            "y": y.transpose(2, 0, 1, 3),
            "yh": ends[0].swapaxes(0, 1),
            "yc": ends[1].swapaxes(0, 1),
        }
    return {"y": y, "yh": ends[0], "yc": ends[1]}


def _read_functions(
    kind: str, attributes: Attributes, direction: int
) -> list[Callable[[np.ndarray], np.ndarray]]:
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    names = attributes.get("activations", DEFAULTS[kind] * directions)
    alphas, betas = (iter(attributes.get(f"activation_{n}", [])) for n in ("alpha", "beta"))
    clip = attributes.get("clip", np.inf)
    found: list[Callable[[np.ndarray], np.ndarray]] = []
    for name in names:
        count, function = FUNCTIONS[name]
        settings = [next(source) for source in (alphas, betas)[:count]]
        found.append(lambda v, f=function, s=tuple(settings): f(v, *s))  # type: ignore[misc]
    count = len(DEFAULTS[kind])
    own = found[count * direction :][:count]
    bounded = [lambda v, f=f: f(np.clip(v, -clip, clip)) for f in own]
    return [*bounded[:2], *own[2:]]


def _step(
    kind: str,
    attributes: Attributes,
    apply: Sequence[Callable[[np.ndarray], np.ndarray]],
    x: np.ndarray,
    r: np.ndarray,
    bias: np.ndarray,
    peepholes: np.ndarray,
    state: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    h, c = state
    wb, rb = np.split(bias, 2)
    n = r.shape[1]
    if kind == "RNN":
        return apply[0](x + h @ r.T + wb + rb), c
    if kind == "GRU":
        x, m = x + wb, h @ r.T + rb
        z, t = apply[0](x[:, :n] + m[:, :n]), apply[0](x[:, n : 2 * n] + m[:, n : 2 * n])
        if attributes.get("linear_before_reset"):
            new = apply[1](x[:, 2 * n :] + t * m[:, 2 * n :])
        else:
            new = apply[1](x[:, 2 * n :] + (t * h) @ r[2 * n :].T + rb[2 * n :])
        return (1 - z) * new + z * h, c
    i, o, f, g = np.split(x + h @ r.T + wb + rb, 4, 1)
    pi, po, pf = np.split(peepholes, 3)
    i, f = apply[0](i + pi * c), apply[0](f + pf * c)
    if attributes.get("input_forget"):
        f = 1 - i
    c = f * c + i * apply[1](g)
    return apply[0](o + po * c) * apply[2](c), c


def draw(kind: str, attributes: Attributes, optional: str = "", *, steps: int = 4) -> Arrays:
    """Draw the inputs of a recurrence: those always there and the optional ones named."""
    random = np.random.default_rng(1)
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    gates, batch, size, hidden = GATES[kind], 3, 2, 5
    state = (directions, batch, hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "x": (steps, batch, size),
        "w": (directions, gates * hidden, size),
        "r": (directions, gates * hidden, hidden),
        "b": (directions, 2 * gates * hidden),
        "h": state,
        "c": state,
        "p": (directions, 3 * hidden),
    }
    if attributes.get("layout"):
        for name in "xhc":
            shapes[name] = (shapes[name][1], shapes[name][0], shapes[name][2])
    arrays = {
        name: random.normal(0, 0.7, shape).astype(np.float32)
        for name, shape in shapes.items()
        if name in {"x", "w", "r", *optional}
    }
    if "l" in optional:
        arrays["lens"] = np.array([2, steps, steps - 1], np.int32)
    return arrays


def make_node(kind: str, attributes: Attributes, arrays: Arrays) -> Any:
    names = [name if name in arrays else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    outputs = ["y", "yh", "yc"] if kind == "LSTM" else ["y", "yh"]
    return helper.make_node(kind, names, outputs, hidden_size=5, **attributes)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("RNN", "", {}),
    ("RNN", "bh", {"direction": "reverse", "clip": 0.4}),
    ("RNN", "blh", {"direction": "bidirectional", "activations": ["Relu", "Softsign"]}),
    ("GRU", "", {}),
    ("GRU", "bh", {"linear_before_reset": 1}),
    ("GRU", "lh", {"direction": "reverse"}),
    ("GRU", "blh", {"direction": "bidirectional", "linear_before_reset": 1}),
    ("GRU", "b", {"direction": "bidirectional", "clip": 0.5}),
    ("GRU", "b", {"activations": ["HardSigmoid", "ScaledTanh"],
                  "activation_alpha": [0.3, 1.7], "activation_beta": [0.4, 0.6]}),
    ("LSTM", "", {}),
    ("LSTM", "bhcp", {}),
    ("LSTM", "bhc", {"direction": "reverse"}),
    ("LSTM", "blhc", {"direction": "bidirectional"}),
    ("LSTM", "blp", {"direction": "bidirectional", "clip": 0.8}),
    ("LSTM", "bhc", {"input_forget": 1}),
    ("LSTM", "bp", {"input_forget": 1, "direction": "reverse"}),
    ("LSTM", "b", {"activations": ["Sigmoid", "Elu", "Softplus"], "activation_alpha": [0.8]}),
    ("LSTM", "b", {"activations": ["HardSigmoid", "LeakyRelu", "Affine", "Sigmoid", "Tanh", "Relu"],
                   "activation_alpha": [0.3, 0.1, 0.5], "activation_beta": [0.4, 0.2],
                   "direction": "bidirectional"}),
]  # fmt: skip


def _name(case: object) -> str:
    return str(case) if isinstance(case, str) else "-".join(map(str, dict(case)))  # type: ignore[call-overload]


@pytest.mark.parametrize(("kind", "optional", "attributes"), CASES, ids=_name)
def test_gradients_are_those_of_the_loop(
    kind: str, optional: str, attributes: dict[str, Any]
) -> None:
    arrays = draw(kind, attributes, optional)
    node = make_node(kind, attributes, arrays)
    hold_gradients(
        [node],
        arrays,
        list(node.output),
        evaluate=lambda feeds: {
            n: v for n, v in evaluate(kind, attributes, feeds).items() if n in node.output
        },
        dynamic={"x": 1} if optional in ("", "b", "bp") else None,
        entries=3,
    )


@pytest.mark.parametrize(("kind", "optional", "attributes"), CASES, ids=_name)
def test_the_loop_computes_what_onnxruntime_computes(
    kind: str, optional: str, attributes: dict[str, Any]
) -> None:
    arrays = draw(kind, attributes, optional)
    node = make_node(kind, attributes, arrays)
    graph = helper.make_graph(
        [node],
        "kernel",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in arrays.items()
        ],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in node.output],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    expected = evaluate(kind, attributes, arrays)
    for name, found in zip(node.output, session.run(None, dict(arrays)), strict=True):
        np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(GATES))
def test_layout_with_the_batch_first(kind: str) -> None:
    attributes = {"layout": 1, "direction": "bidirectional"}
    arrays = draw(kind, attributes, "bh")
    node = make_node(kind, attributes, arrays)
    outputs = list(node.output)
    hold_gradients(
        [node],
        arrays,
        outputs,
        evaluate=lambda feeds: {
            n: v for n, v in evaluate(kind, attributes, feeds).items() if n in outputs
        },
        entries=3,
    )


def test_lengths_that_only_the_data_know() -> None:
    arrays = draw("LSTM", {}, "bl")
    node = make_node("LSTM", {}, arrays)
    hold_gradients(
        [node],
        arrays,
        list(node.output),
        evaluate=lambda feeds: evaluate("LSTM", {}, feeds),
        dynamic={"x": 1, "lens": 0},
        entries=3,
    )


@pytest.mark.parametrize("kind", list(GATES))
def test_only_the_last_state_is_used(kind: str) -> None:
    arrays = draw(kind, {}, "b")
    node = make_node(kind, {}, arrays)
    hold_gradients(
        [node],
        arrays,
        ["yh"],
        evaluate=lambda feeds: {"yh": evaluate(kind, {}, feeds)["yh"]},
        entries=3,
    )


def write_dynamic(kind: str, attributes: Attributes, arrays: Arrays) -> onnx.ModelProto:
    """Write a model that knows neither the length nor the batch size of any of its inputs.

    All that has no batch is a parameter; the loss is the sum of the squares of all outputs.
    """
    node = make_node(kind, attributes, arrays)
    sizes: dict[str, list[str | int]] = {"x": ["T", "N", 2], "lens": ["N"]}
    sizes |= {name: [arrays["w"].shape[0], "N", 5] for name in ("h", "c")}
    if attributes.get("layout"):
        sizes = {n: [s[1], s[0], s[2]] if len(s) > 1 else s for n, s in sizes.items()}
    nodes = [node]
    for name in node.output:
        nodes.append(helper.make_node("ReduceSumSquare", [name], [f"{name}.sum"], keepdims=0))
    nodes.append(helper.make_node("Sum", [f"{name}.sum" for name in node.output], ["total"]))
    graph = helper.make_graph(
        nodes,
        "dynamic",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), sizes[n])
            for n, a in arrays.items()
            if n in sizes
        ],
        [helper.make_tensor_value_info("total", FLOAT, [])],
        [numpy_helper.from_array(a, n) for n, a in arrays.items() if n not in sizes],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def hold_dynamic(bundle: Bundle, kind: str, attributes: Attributes, arrays: Arrays) -> None:
    """Hold gradients of a few entries of each parameter against differences of the numpy loop."""
    outputs = ["y", "yh", "yc"] if kind == "LSTM" else ["y", "yh"]
    wide = {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in arrays.items()}

    def measure() -> float:
        found = evaluate(kind, attributes, wide)
        return sum(float(np.sum(found[name] ** 2)) for name in outputs)

    found = run_step(bundle, arrays)
    assert float(found["loss"]) == pytest.approx(measure(), rel=1e-5)
    for name in set(arrays) - {"x", "h", "c", "lens"}:
        gradient = found[f"{name}_grad"]
        scale = max(float(np.abs(gradient).max()), 1e-3)
        for index, slope in differentiate_numerically(measure, wide[name], entries=3):
            assert abs(float(gradient[index]) - slope) <= 1e-3 * scale, f"{name}{index}"


LAYOUTS: list[tuple[str, str, dict[str, Any]]] = [
    (kind, "blhc" if kind == "LSTM" else "blh", {"layout": 1, "direction": "bidirectional"})
    for kind in GATES
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kind", "optional", "attributes"), [*CASES, *LAYOUTS], ids=_name)
def test_lengths_and_batches_that_only_the_data_know(
    kind: str, optional: str, attributes: dict[str, Any], target: Target
) -> None:
    """One bundle takes sequences of 4 steps, one step alone, and one sequence alone."""
    arrays = dict(draw(kind, attributes, optional))
    model = write_dynamic(kind, attributes, arrays)
    bundle = cut(model, at=None, loss="from-model", client_target=target)
    hold_dynamic(bundle, kind, attributes, arrays)
    time = attributes.get("layout", 0)
    single = {**arrays, "x": np.take(arrays["x"], [2], time)}
    if "lens" in arrays:
        single["lens"] = np.array([1, 1, 1], np.int32)
    hold_dynamic(bundle, kind, attributes, single)
    row = {
        n: np.take(a, [1], 0 if n == "lens" else 0 if time else 1)
        if n in ("x", "h", "c", "lens")
        else a
        for n, a in arrays.items()
    }
    hold_dynamic(bundle, kind, attributes, row)


def test_an_unknown_activation_is_refused() -> None:
    net = Net()
    names = [net.weight("w", 1, 5, 2), net.weight("r", 1, 5, 5)]
    net.op("RNN", "x", *names, out="y", hidden_size=5, activations=["Swoosh"])
    model = net.finish({"x": (FLOAT, [3, "N", 2])}, "y", 1, "N", 5)
    with pytest.raises(UnsupportedModel, match="no known activation 'Swoosh'"):
        cut(model, at=None, loss="mse")


@pytest.mark.parametrize("kind", GATES)
def test_a_recurrence_of_many_steps_is_a_few_nodes(kind: str) -> None:
    net = Net()
    size = GATES[kind] * 3
    net.op(kind, "x", net.weight("w", 1, size, 4), net.weight("r", 1, size, 3), out="y",
           hidden_size=3)  # fmt: skip
    model = net.finish({"x": (FLOAT, [10_000, 2, 4])}, "y", 1, 2, 3)
    bundle = cut(model, at=None, loss="mse")
    graph = onnx.load_from_string(bundle.client.graphs[STEP]).graph
    assert [node.op_type for node in graph.node].count("Scan") == 2
    assert len(graph.node) < 60


@pytest.mark.parametrize("frozen", ["^[wr]$", "^[rb]$", "^w$"])
@pytest.mark.parametrize("kind", GATES)
def test_what_is_not_frozen_is_trained(kind: str, frozen: str) -> None:
    arrays = draw(kind, {}, "b")
    model = write_dynamic(kind, {}, arrays)
    bundle = cut(model, at=None, loss="from-model", freeze=[frozen])
    found, whole = (run_step(b, arrays) for b in (bundle, cut(model, at=None, loss="from-model")))
    trained = {name for name in "wrb" if f"{name}_grad" in found}
    assert trained == {name for name in "wrb" if name not in frozen}
    for name in trained:
        np.testing.assert_allclose(
            found[f"{name}_grad"], whole[f"{name}_grad"], rtol=1e-5, atol=1e-6
        )
