"""Updates: the graphs of SGD, Adam and AdamW against their formulas in float64, step by step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from splitonnx.manifests import LEARNING_RATE, STEP, Role
from splitonnx.optimizers import SGD, Adam, AdamW, Optimizer, ParameterGroup
from splitonnx.partitioner.differentiation.updates import (
    NEXT,
    Norms,
    build_norms,
    build_update,
)
from splitonnx.partitioner.graphs.builders import known_array
from splitonnx.tensors import TensorSpec

Arrays = dict[str, np.ndarray]
SPECS = [
    TensorSpec(name="w", dtype="F32", shape=(3, 4)),
    TensorSpec(name="b", dtype="F32", shape=(4,)),
]
SHAPES: Mapping[str, tuple[int, ...]] = {"w": (3, 4), "b": (4,)}
GRADIENTS = {"w": "w_grad", "b": "b_grad"}
RATE = 0.05


def run(graph: ir.Graph, feeds: Mapping[str, np.ndarray]) -> Arrays:
    content = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
    session = onnxruntime.InferenceSession(content)
    used = [value.name for value in session.get_inputs()]
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {n: feeds[n] for n in used}), strict=True))


def train(optimizer: Optimizer, steps: Sequence[Arrays], *, portable: bool) -> list[Arrays]:
    """Update the parameters with one set of gradients after the other."""
    made = build_update(SPECS, GRADIENTS, optimizer, portable=portable)
    state = start()
    state |= {
        s.tensor.name: np.zeros(SHAPES[s.tensor.name.split("#")[0]], np.float32) for s in made.state
    }
    history = []
    for number, gradients in enumerate(steps, 1):
        scalars = {LEARNING_RATE: np.float32(RATE), STEP: np.int64(number)}
        feeds = {n: np.asarray(a) for n, a in {**state, **gradients, **scalars}.items()}
        found = run(made.graph, feeds)
        state |= {name: found[output] for name, output in made.commits.items()}
        history.append({name: state[name] for name in GRADIENTS})
    return history


def start() -> Arrays:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def draw_gradients(count: int) -> list[Arrays]:
    random = np.random.default_rng(1)
    return [
        {GRADIENTS[n]: random.standard_normal(s, np.float32) for n, s in SHAPES.items()}
        for _ in range(count)
    ]


def find_settings(optimizer: Optimizer, name: str) -> tuple[float, float]:
    """The rate and the weight decay of a parameter, as of a torch optimizer with that group."""
    rate, decay = RATE, optimizer.weight_decay
    for group in optimizer.groups:
        if re.search(group.pattern, name):
            rate = RATE * group.lr_factor
            decay = optimizer.weight_decay if group.weight_decay is None else group.weight_decay
    return rate, decay


def refer(optimizer: Optimizer, steps: Sequence[Arrays]) -> list[Arrays]:
    """The formulas of torch.optim, in float64."""
    values = {name: array.astype(np.float64) for name, array in start().items()}
    first = {name: np.zeros_like(array) for name, array in values.items()}
    second = {name: np.zeros_like(array) for name, array in values.items()}
    history = []
    for number, gradients in enumerate(steps, 1):
        for name in values:
            g = gradients[GRADIENTS[name]].astype(np.float64)
            p, (rate, decay) = values[name], find_settings(optimizer, name)
            if isinstance(optimizer, AdamW):
                p = p * (1 - rate * decay)
            else:
                g = g + decay * p
            if isinstance(optimizer, SGD):
                first[name] = optimizer.momentum * first[name] + g
                values[name] = p - rate * first[name]
                continue
            assert isinstance(optimizer, Adam)
            first[name] = optimizer.beta1 * first[name] + (1 - optimizer.beta1) * g
            second[name] = optimizer.beta2 * second[name] + (1 - optimizer.beta2) * g**2
            mean = first[name] / (1 - optimizer.beta1**number)
            square = second[name] / (1 - optimizer.beta2**number)
            values[name] = p - rate * mean / (np.sqrt(square) + optimizer.eps)
        history.append(dict(values))
    return history


OPTIMIZERS = [
    SGD(lr=RATE),
    SGD(lr=RATE, momentum=0.9, weight_decay=0.1),
    Adam(lr=RATE),
    Adam(lr=RATE, beta1=0.5, beta2=0.9, weight_decay=0.1),
    AdamW(lr=RATE),
    AdamW(lr=RATE, weight_decay=0.0),
    AdamW(lr=RATE, beta1=0.0, weight_decay=0.3),
    SGD(lr=RATE, momentum=0.9, weight_decay=0.1, groups=[ParameterGroup(pattern="b", lr_factor=2)]),
    SGD(lr=RATE, groups=[ParameterGroup(pattern="w", lr_factor=0.1, weight_decay=0.3)]),
    Adam(lr=RATE, groups=[ParameterGroup(pattern="w", weight_decay=0.3)]),
    AdamW(
        lr=RATE,
        weight_decay=0.3,
        groups=[
            ParameterGroup(pattern=".", lr_factor=0.5),
            ParameterGroup(pattern="b", weight_decay=0),
        ],
    ),
    AdamW(lr=RATE, weight_decay=0.3, groups=[ParameterGroup(pattern="w", lr_factor=0)]),
]


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_an_update_follows_the_optimizers_formula(optimizer: Optimizer, portable: bool) -> None:
    steps = draw_gradients(4)
    found, expected = train(optimizer, steps, portable=portable), refer(optimizer, steps)
    for ours, right in zip(found, expected, strict=True):
        for name, array in right.items():
            np.testing.assert_allclose(ours[name], array, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    "optimizer",
    [AdamW(lr=RATE, weight_decay=0.1), SGD(lr=RATE, momentum=0.9, weight_decay=0.1)],
    ids=repr,
)
def test_scalars_have_as_many_dimensions_as_a_parameter_that_ends_in_ones(
    optimizer: Optimizer,
) -> None:
    spec = TensorSpec(name="w", dtype="F32", shape=(3, 4, 1, 1))
    graph = build_update([spec], GRADIENTS, optimizer).graph
    model = onnx.shape_inference.infer_shapes(ir.to_proto(ir.Model(graph, ir_version=9)))
    typed = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in typed}
    for node in model.graph.node:
        if node.op_type in ("Add", "Sub", "Mul", "Div"):
            assert len({ranks[name] for name in node.input}) == 1, node.name


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("number", [1, 2, 10, 1000, 10**6])
def test_the_corrections_of_adam_hold_at_any_step(number: int, portable: bool) -> None:
    """With a first moment of zero but for this gradient, a step is their quotient alone."""
    optimizer = Adam(lr=1.0, beta1=0.9, beta2=0.999)
    made = build_update(SPECS[1:], GRADIENTS, optimizer, portable=portable)
    feeds = {
        "b": np.zeros(4, np.float32), "b_grad": np.ones(4, np.float32),
        "b#exp_avg": np.zeros(4, np.float32), "b#exp_avg_sq": np.zeros(4, np.float32),
        LEARNING_RATE: np.float32(1), STEP: np.int64(number),
    }  # fmt: skip
    found = run(made.graph, {n: np.asarray(a) for n, a in feeds.items()})[f"b{NEXT}"]
    mean, square = 0.1 / (1 - 0.9**number), 0.001 / (1 - 0.999**number)
    np.testing.assert_allclose(found, np.full(4, -mean / (np.sqrt(square) + 1e-8)), rtol=3e-6)


def test_a_portable_update_has_no_double_precision() -> None:
    for portable in (False, True):
        graph = build_update(SPECS, GRADIENTS, AdamW(), portable=portable).graph
        casts = {n.attributes.get_int("to", 0) for n in graph if n.op_type == "Cast"}
        assert (ir.DataType.DOUBLE.value in casts) is not portable


def test_a_group_may_have_parameters_of_the_other_party_alone() -> None:
    optimizer = SGD(lr=RATE, groups=[ParameterGroup(pattern="^b$", lr_factor=0.5)])
    made = build_update(SPECS[:1], GRADIENTS, optimizer)
    plain = build_update(SPECS[:1], GRADIENTS, SGD(lr=RATE))
    assert [node.op_type for node in made.graph] == [node.op_type for node in plain.graph]


def test_the_state_that_an_optimizer_keeps_is_declared_and_replaced() -> None:
    made = build_update(SPECS, GRADIENTS, AdamW())
    names = [spec.tensor.name for spec in made.state]
    assert names == ["w#exp_avg", "w#exp_avg_sq", "b#exp_avg", "b#exp_avg_sq"]
    assert {spec.role for spec in made.state} == {Role.OPTIMIZER}
    assert [spec.tensor.shape for spec in made.state] == [(3, 4), (3, 4), (4,), (4,)]
    assert made.commits == {n: n + NEXT for n in ("w", "b", *names)}
    assert build_update(SPECS, GRADIENTS, SGD(lr=1.0)).state == ()
    inputs = [value.name for value in build_update(SPECS, GRADIENTS, SGD(lr=1.0)).graph.inputs]
    assert STEP not in inputs


def test_norms_are_squared_sums_in_the_order_of_the_parameters() -> None:
    graph = build_norms(SPECS, GRADIENTS, "norms")
    (gradients,) = draw_gradients(1)
    (found,) = ReferenceEvaluator(ir.to_proto(ir.Model(graph, ir_version=9))).run(None, gradients)
    expected = [float((gradients[GRADIENTS[s.name]].astype(np.float64) ** 2).sum()) for s in SPECS]
    np.testing.assert_allclose(np.asarray(found), np.array(expected), rtol=1e-6)


@pytest.mark.parametrize("limit", [0.1, 1.0, 1e6])
def test_gradients_are_clipped_to_the_norm_of_all_parties(limit: float) -> None:
    """The other party's norms count: the whole model's norm is 13 where this party's is 5."""
    spec = TensorSpec(name="b", dtype="F32", shape=(2,))
    norms = Norms(sizes={"mine": 1, "theirs": 2}, order=[2, 0, 1])
    update = build_update([spec], {"b": "g"}, SGD(lr=1.0, clip_norm=limit), norms)
    feeds = {
        "b": np.zeros(2, np.float32), "g": np.array([3, 4], np.float32),
        "mine": np.array([25], np.float32), "theirs": np.array([100, 44], np.float32),
        LEARNING_RATE: np.array(1, np.float32),
    }  # fmt: skip
    factor = min(1.0, limit / (13 + 1e-6))
    found = run(update.graph, feeds)[f"b{NEXT}"]
    np.testing.assert_allclose(found, -factor * np.array([3, 4]), rtol=1e-6)


def test_the_order_of_summation_is_the_whole_models() -> None:
    """In float32 1e8 + 1 - 1e8 depends on the order, so the order decides here which norm it is."""
    spec = TensorSpec(name="b", dtype="F32", shape=(1,))
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        norms = Norms(sizes={"mine": 3}, order=order)
        graph = build_update([spec], {"b": "g"}, SGD(lr=1.0, clip_norm=1.0), norms).graph
        gather = next(node for node in graph if node.op_type == "Gather")
        picked = known_array(gather.inputs[1])
        assert picked is not None
        results.append(picked.tolist())
    assert results == [[0, 1, 2], [2, 0, 1]]
