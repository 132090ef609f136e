"""Models that end in a Softmax or a Sigmoid of several nodes, as some exporters write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.remarks import Kind
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.verifications import verify
from tests.support.case_trials import run_step
from tests.support.derivatives import hold_steps
from tests.support.nets import FLOAT, Net
from tests.support.oracles import LOSSES
from tests.support.small_models import Arrays, evaluate

Node = tuple[str, list[str], str, dict[str, Any]]
SOFTMAX: list[Node] = [
    ("Exp", ["scores"], "e", {}),
    ("ReduceSum", ["e", "axis"], "z", {}),
    ("Div", ["e", "z"], "active", {}),
]
SPELLINGS: dict[str, tuple[str, list[Node]]] = {
    "softmax": ("cross-entropy", SOFTMAX),
    "softmax as in JAX": (
        "cross-entropy",
        [
            ("ReduceMax", ["scores", "axis"], "top", {}),
            ("Sub", ["scores", "top"], "shifted", {}),
            ("Exp", ["shifted"], "e", {}),
            ("ReduceSum", ["e", "axis"], "sum", {"keepdims": 0}),
            ("Unsqueeze", ["sum", "axis"], "z", {}),
            ("Div", ["e", "z"], "active", {}),
        ],
    ),
    "exp of LogSoftmax": (
        "cross-entropy",
        [("LogSoftmax", ["scores"], "l", {"axis": 1}), ("Exp", ["l"], "active", {})],
    ),
    "exp less ReduceLogSumExp": (
        "cross-entropy",
        [
            ("ReduceLogSumExp", ["scores", "axis"], "z", {}),
            ("Sub", ["scores", "z"], "l", {}),
            ("Exp", ["l"], "active", {}),
        ],
    ),
    "exp over its L1 norm": (
        "cross-entropy",
        [
            ("Exp", ["scores"], "e", {}),
            ("ReduceL1", ["e", "axis"], "z", {}),
            ("Div", ["e", "z"], "active", {}),
        ],
    ),
    "exp normalized by one node": (
        "cross-entropy",
        [("Exp", ["scores"], "e", {}), ("LpNormalization", ["e"], "active", {"axis": 1, "p": 1})],
    ),
    "exp over its sum by Einsum": (
        "cross-entropy",
        [
            ("Exp", ["scores"], "e", {}),
            ("Einsum", ["e"], "sum", {"equation": "nc->n"}),
            ("Unsqueeze", ["sum", "axis"], "z", {}),
            ("Div", ["e", "z"], "active", {}),
        ],
    ),
    "exp(-softplus(-x))": (
        "bce-with-logits",
        [
            ("Neg", ["scores"], "n", {}),
            ("Softplus", ["n"], "s", {}),
            ("Neg", ["s"], "l", {}),
            ("Exp", ["l"], "active", {}),
        ],
    ),
    "exp(x - log(1 + exp(x)))": (
        "bce-with-logits",
        [
            ("Exp", ["scores"], "e", {}),
            ("Add", ["one", "e"], "z", {}),
            ("Log", ["z"], "s", {}),
            ("Sub", ["scores", "s"], "l", {}),
            ("Exp", ["l"], "active", {}),
        ],
    ),
    "1 / (1 + exp(-x))": (
        "bce-with-logits",
        [
            ("Neg", ["scores"], "n", {}),
            ("Exp", ["n"], "e", {}),
            ("Add", ["one", "e"], "z", {}),
            ("Div", ["one", "z"], "active", {}),
        ],
    ),
    "exp(x) / (1 + exp(x))": (
        "bce-with-logits",
        [
            ("Exp", ["scores"], "e", {}),
            ("Add", ["e", "one"], "z", {}),
            ("Div", ["e", "z"], "active", {}),
        ],
    ),
    "0.5 (tanh(x / 2) + 1)": (
        "bce-with-logits",
        [
            ("Div", ["scores", "two"], "quiet", {}),
            ("Tanh", ["quiet"], "t", {}),
            ("Add", ["t", "one"], "z", {}),
            ("Mul", ["half", "z"], "active", {}),
        ],
    ),
}
"""Losses, and the nodes that spell out the activation that each of them contains."""


def build(nodes: list[Node]) -> onnx.ModelProto:
    """Make ``x [N, 4] -> h -> scores -> active``; without nodes, the output is the scores."""
    net = Net()
    for name, number in (("one", 1), ("two", 2), ("half", 0.5)):
        net.constant(name, np.array(number, np.float32))
    net.constant("axis", np.array([1]))
    net.constant("batch", np.array([0]))
    net.op("MatMul", "x", net.weight("first", 4, 5), out="h")
    net.op("MatMul", "h", net.weight("last", 5, 6), out="scores")
    for kind, inputs, output, attributes in nodes:
        net.op(kind, *inputs, out=output, **attributes)
    last = net.op("Identity", "active" if nodes else "scores", out="y")
    return net.finish({"x": (FLOAT, ["N", 4])}, last, 6)


def draw(loss: str) -> Arrays:
    random = np.random.default_rng(6)
    x = random.standard_normal((4, 4)).astype(np.float32)
    classes = np.asarray(random.integers(0, 6, 4))
    rates = random.random((4, 6)).astype(np.float32)
    return {"x": x, "labels": classes if loss == "cross-entropy" else rates}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_activation_is_applied_once(spelling: str) -> None:
    loss, nodes = SPELLINGS[spelling]
    scores, data = build([]), draw(loss)
    target: Target = "training"
    bundle = cut(build(nodes), at=None, loss=loss, client_target=target, server_target=target)
    found = run_step(bundle, data)
    expected = LOSSES[loss](evaluate(scores, data)["y"], data["labels"])
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-5)
    assert {"first_grad", "last_grad"} <= found.keys()
    hold_steps([found], scores, loss, data, ["first", "last"])


@pytest.mark.parametrize("spelling", ["exp over its sum by Einsum", "exp over its L1 norm"])
def test_an_evaluation_computes_the_loss_of_training(spelling: str) -> None:
    loss, nodes = SPELLINGS[spelling]
    data = draw(loss)
    expected = LOSSES[loss](evaluate(build([]), data)["y"], data["labels"])
    with Client(cut(build(nodes), at=None, loss=loss).client, threads=1) as client:
        assert client.evaluate(data)["loss"] == pytest.approx(expected, rel=1e-4)


def test_check_says_what_training_skips_though_the_model_spells_it_otherwise() -> None:
    _, nodes = SPELLINGS["exp over its sum by Einsum"]
    (remark,) = [r for r in check(build(nodes)).remarks if r.kind is Kind.ACTIVATION_SKIPPED]
    assert remark.names == ("y", "scores")


@pytest.mark.parametrize("p", [1, 2])
def test_other_norms_are_left_to_the_model(p: int) -> None:
    kind = "Exp" if p == 2 else "Identity"
    nodes: list[Node] = [
        (kind, ["scores"], "e", {}), ("LpNormalization", ["e"], "active", {"axis": 1, "p": p}),
    ]  # fmt: skip
    model, data = build(nodes), draw("cross-entropy")
    expected = LOSSES["cross-entropy"](evaluate(model, data)["y"], data["labels"])
    found = run_step(cut(model, at=None), data)
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-5)


def test_it_is_inverted_where_a_cut_stands_inside_it() -> None:
    loss, data = "cross-entropy", draw("cross-entropy")
    bundle = cut(build(SOFTMAX), at="h", tail_at="e", loss=loss)
    expected = LOSSES[loss](evaluate(build([]), data)["y"], data["labels"])
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1) as client:
        assert client.evaluate(data)["loss"] == pytest.approx(expected, rel=1e-4)
        assert client.step(data)["loss"] == pytest.approx(expected, rel=1e-4)
    assert verify(bundle, data, batch_size=4, rtol=1e-4).ok


def test_a_softmax_over_another_axis_is_left_to_the_model() -> None:
    nodes = [(kind, ["batch" if i == "axis" else i for i in own], out, more)
             for kind, own, out, more in SOFTMAX]  # fmt: skip
    model, data = build(nodes), draw("cross-entropy")
    expected = LOSSES["cross-entropy"](evaluate(model, data)["y"], data["labels"])
    found = run_step(cut(model, at=None), data)
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-5)
