"""Gradients of operators in bodies on both targets, against differences of the model in float64."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from splitonnx.errors import UnsupportedModel
from splitonnx.optimizers import SGD
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut, cut_prepared
from splitonnx.runtime.client.clients import Client
from tests.support.case_trials import TARGETS, run_step
from tests.support.derivatives import draw_labels, hold_steps

_HEAD = """
<ir_version: 9, opset_import: ["" : 18]>
bodies (float[N, 2, 6] x, bool c, int64 most) => (float[N, 2] y)
{ h = MatMul (x, w) """
_IF = """ e = If (c) <
    then_branch = one () => (float[N, 2] e1) { STEP  e1 = Tanh (r) },
    else_branch = two () => (float[N, 2] e2) { e2 = ReduceMean <keepdims = 0> (h, last) }
>  y = MatMul (e, v) }"""
_LOOP = """ a = ReduceMean <keepdims = 0> (h, last)  e = Loop <
    body = step (int64 i, bool on, float[N, 2] d) => (bool off, float[N, 2] f) {
        off = Identity (on)  STEP  t = Tanh (r)  f = Add (d, t) }
> (most, c, a)  y = MatMul (e, v) }"""
_REDUCED = "  r = ReduceMean <keepdims = 0> (g, last)"
STEPS = {
    "Gather": "k = Constant <value_ints = [2, 0, 2]> ()  g = Gather <axis = 2> (h, k)" + _REDUCED,
    "Compress": "k = Constant <value_ints = [1, 0, 1]> ()  l = Cast <to = 9> (k)  "
    "g = Compress <axis = 2> (h, l)" + _REDUCED,
    "Resize": "k = Constant <value_floats = [1.0, 1.0, 2.0]> ()  "
    'b = Resize <mode = "linear"> (h, , k)  g = Mul (b, b)' + _REDUCED,
    "LpPool": "g = LpPool <kernel_shape = [2], p = 2> (h)" + _REDUCED,
    "ConvTranspose": "b = ConvTranspose <strides = [2]> (h, z)  g = Mul (b, b)" + _REDUCED,
    "MaxPool that rounds up": "k = Constant <value_ints = [1]> ()  u = Unsqueeze (h, last)  "
    "b = MaxPool <kernel_shape = [1, 2], strides = [1, 2], pads = [0, 0, 0, 1], ceil_mode = 1> (u)"
    "  q = Squeeze (b, last)  g = Mul (q, q)" + _REDUCED,
    "SequenceConstruct": "u = Mul (h, h)  q = SequenceConstruct (h, u)  "
    "b = ConcatFromSequence <axis = 2> (q)  g = Mul (b, b)" + _REDUCED,
    "SplitToSequence": "k = Constant <value_ints = [2, 4]> ()  "
    "q = SplitToSequence <axis = 2> (h, k)  o = Constant <value_int = 1> ()  "
    "p = SequenceAt (q, o)  g = Mul (p, p)" + _REDUCED,
    "SequenceInsert": "p = Identity (h)  q = SequenceEmpty ()  "
    "m = SequenceInsert (q, p)  j = SequenceInsert (m, h)  "
    "g = ConcatFromSequence <axis = 2> (j)" + _REDUCED,
    "Reshape": "g = Mul (h, h)  m = ReduceMean <keepdims = 0> (g, last)  "
    "k = Constant <value_ints = [-1]> ()  b = Reshape (m, k)  q = Shape <start = 1> (m)  "
    "j = Concat <axis = 0> (k, q)  r = Reshape (b, j)",
    "Col2Im": "k = Constant <value_ints = [3, 3]> ()  j = Constant <value_ints = [2, 1]> ()  "
    "b = Col2Im (h, k, j)  q = ReduceMean <keepdims = 0> (b, last)  s = Concat <axis = 1> (q, q)  "
    "g = Mul (s, s)" + _REDUCED,
}


def write_body(around: str, step: str) -> onnx.ModelProto:
    """Write an If or a Loop whose body has the nodes of ``step``."""
    model = onnx.parser.parse_model(_HEAD + around.replace("STEP", step))
    random = np.random.default_rng(0)
    for name, shape in (("w", (6, 6)), ("v", (2, 2)), ("z", (2, 2, 3))):
        if name != "z" or "z)" in step:
            weights = random.standard_normal(shape, np.float32)
            model.graph.initializer.append(numpy_helper.from_array(weights, name))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2]), "last"))
    return model


@pytest.mark.parametrize("around", [_IF, _LOOP], ids=["if", "loop"])
@pytest.mark.parametrize("kind", STEPS)
def test_gradients_of_an_operator_in_a_body(kind: str, around: str) -> None:
    model = write_body(around, STEPS[kind])
    random = np.random.default_rng(3)
    data = {"x": random.standard_normal((4, 2, 6), np.float32), "c": np.array(True)}
    data["most"] = np.array(2)
    given = {**data, "labels": draw_labels(model, data)}
    prepared = prepare(open_model(model))
    steps = [
        run_step(cut_prepared(prepared, at=None, loss="mse", client_target=target), given)
        for target in TARGETS
    ]
    hold_steps(steps, model, "mse", given, prepared.trainable)


@pytest.mark.parametrize("around", [_IF, _LOOP], ids=["if", "loop"])
def test_a_number_in_a_body_is_trained_if_it_is_named(around: str) -> None:
    """As it is outside of bodies, where it is a constant, too, unless the user names it."""

    def write(half: float) -> onnx.ModelProto:
        step = f"half = Constant <value = float {{{half}}}> ()  g = Mul (h, half)" + _REDUCED
        return write_body(around, step)

    random = np.random.default_rng(3)
    data = {"x": random.standard_normal((4, 2, 6), np.float32), "c": np.array(True)}
    data["most"] = np.array(2)
    labels = draw_labels(write(0.5), data)

    def measure(half: float) -> float:
        session = onnxruntime.InferenceSession(write(half).SerializeToString())
        feeds = {value.name: data[value.name] for value in session.get_inputs()}
        return float(((session.run(None, feeds)[0].astype(np.float64) - labels) ** 2).mean())

    slope = (measure(0.51) - measure(0.49)) / 0.02
    assert "half" not in prepare(open_model(write(0.5))).trainable
    for target in TARGETS:
        bundle = cut(
            write(0.5),
            at=None,
            loss="mse",
            train=["^half$"],
            optimizer=SGD(lr=1.0),
            client_target=target,
        )
        with Client(bundle.client, threads=1) as client:
            client.step({**data, "labels": labels})
            found = 0.5 - float(client.state()["half"])
        assert found == pytest.approx(slope, rel=1e-3)


def test_what_cannot_be_trained_in_a_body_is_refused_for_what_it_is() -> None:
    with pytest.raises(UnsupportedModel, match=r"'k' in a body of node 'e' .*: it is INT64, which"):
        cut(write_body(_LOOP, STEPS["Gather"]), at=None, loss="mse", train=["^k$"])
