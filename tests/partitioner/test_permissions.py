"""Tests that raw inputs and labels leave the client only if the user named them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import splitonnx
from splitonnx.commands.disclosures import summarize_explanation
from splitonnx.disclosures import list_sent
from splitonnx.errors import InputsNotPermitted, LabelsNotPermitted, NotACut, UsageError
from splitonnx.manifests import WireKind
from splitonnx.names import CLIENT, TRAIN, Target
from splitonnx.partitioner import partitions, permissions
from splitonnx.partitioner.cutting import joints
from splitonnx.runtime.client.flows import Dependence
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from tests.support.carried import build_delayed
from tests.support.recordings import RecordingTransport
from tests.support.zoo import FLOAT, ZOO, Net


def list_data_sent(bundle: splitonnx.Bundle) -> set[str]:
    wires = bundle.client.manifest.phase(TRAIN).wires
    return {
        wire.tensor.name for wire in wires if wire.sender == CLIENT and wire.kind is WireKind.INPUT
    }


def build_masked() -> onnx.ModelProto:
    """Build two layers that a mask reaches, the second after it was scaled without a weight."""
    net = Net()
    masked = net.op("Mul", net.op("MatMul", "x", net.weight("w1", 4, 4), out="h1"), "mask", out="m")
    hidden = net.op("Relu", masked, out="h2")
    scaled = net.op("Neg", net.op("Exp", "mask", out="e"), out="scaled")
    hidden = net.op("Add", net.op("MatMul", hidden, net.weight("w2", 4, 4), out="h3"), scaled,
                    out="h4")  # fmt: skip
    output = net.op("MatMul", hidden, net.weight("w3", 4, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 4]), "mask": (FLOAT, ["N", 4])}, output, 3)


@pytest.mark.parametrize("options", [{"at": "act1"}, {"at": "x"}, {"at": "x", "tail_at": "act3"}])
def test_what_may_not_be_sent_is_refused_before_the_model_is_differentiated(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joints, "differentiate", lambda *_: pytest.fail("it was differentiated"))
    with pytest.raises((InputsNotPermitted, LabelsNotPermitted)):
        splitonnx.cut(ZOO["chain"].build(), **options)


def test_labels_stay_unless_they_are_named() -> None:
    model = ZOO["chain"].build()
    with pytest.raises(LabelsNotPermitted, match=r"--send-labels .*send_labels=True.*--tail-at"):
        splitonnx.cut(model, at="act1")
    assert list_data_sent(splitonnx.cut(model, at="act1", send_labels=True)) == {"labels@server"}
    assert list_data_sent(splitonnx.cut(model, at="act1", tail_at="act3")) == set()


def build_tails() -> onnx.ModelProto:
    """Build layers that end in what has no weights, a scale alone, or a product of two of them."""
    net = Net()
    image = net.op("Conv", "x", net.weight("k1", 4, 2, 3, 3), out="c1")
    image = net.op("Conv", net.op("Relu", image, out="r1"), net.weight("k2", 3, 4, 3, 3), out="c2")
    mixed = net.op("Conv", net.op("Relu", image, out="r2"), net.weight("k3", 3, 3, 1, 1), out="c3")
    scaled = net.op("Mul", mixed, net.weight("scale", 3, 1, 1), out="s")
    output = net.op("Flatten", net.op("GlobalAveragePool", scaled, out="pool"), out="scores")
    return net.finish({"x": (FLOAT, ["N", 2, 6, 6])}, output, 3)


def find_told(bundle: splitonnx.Bundle) -> set[str]:
    """Find the tensors of which ``explain`` says that they tell the server the labels."""
    found = summarize_explanation(splitonnx.explain(bundle.client))
    (train,) = (phase for phase in found["phases"] if phase["phase"] == TRAIN)
    sentences = [sentence for array in train["arrays"] for sentence in array["sentences"]]
    telling = [
        sentence for sentence in sentences if "the server can compute the labels" in sentence
    ]
    return {sentence.split("'")[1] for sentence in telling}


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("loss", ["cross-entropy", "mse", "l1", "bce-with-logits"])
def test_a_gradient_that_no_layer_of_the_tail_mixes_tells_the_labels(
    loss: str, target: Target
) -> None:
    model = build_tails()
    options: dict[str, Any] = {"loss": loss, "client_target": target, "check": False}
    for tail in ("scores", "pool", "s", "c3"):
        with pytest.raises(LabelsNotPermitted, match=f"between the loss and '{tail}'.*-labels"):
            splitonnx.cut(model, at="r1", tail_at=tail, **options)
        cut = splitonnx.cut(model, at="r1", tail_at=tail, send_labels=True, **options)
        assert list_data_sent(cut) == set()
        for party in cut.parties.values():
            assert party.manifest.tells_labels == (f"{tail}@client_grad",)
        (told,) = (t for t in list_sent(cut.client.manifest, TRAIN).tensors if t.tells_labels)
        assert str(told).endswith("the server can compute the labels from it)")
        assert find_told(cut) == {tail}
    for tail in ("c2", "r2"):
        cut = splitonnx.cut(model, at="r1", tail_at=tail, **options)
        assert cut.client.manifest.tells_labels == ()
        assert find_told(cut) == set()
        with pytest.raises(UsageError, match="does not send the labels"):
            splitonnx.cut(model, at="r1", tail_at=tail, send_labels=True, **options)


def test_the_labels_can_be_read_from_a_gradient_that_needs_the_permission(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = splitonnx.cut(build_tails(), at="r1", tail_at="scores", send_labels=True)
    assert "the server can compute the labels from the gradient of 'scores'" in caplog.text
    random = np.random.default_rng(0)
    x, labels = random.standard_normal((32, 2, 6, 6)).astype(np.float32), random.integers(0, 3, 32)
    assert bundle.server is not None
    server = RecordingTransport(Executor(bundle.server, Engine(threads=1)))
    with splitonnx.Client(bundle.client, server, threads=1) as client:
        client.step({"x": x, "labels": labels})
    sent = [tensors for step in server.sent[TRAIN].values() for tensors in step.items()]
    (gradient,) = (value for name, value in sent if name == "scores@client_grad")
    np.testing.assert_array_equal(gradient.argmin(axis=1), labels)


def test_what_the_server_computed_is_no_layer_of_the_tail() -> None:
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w1", 4, 4), out="h")
    left = net.op("MatMul", hidden, net.weight("w2", 4, 4), out="left")
    right = net.op("MatMul", hidden, net.weight("w3", 4, 3), out="right")
    left, right = net.op("Tanh", left, out="t"), net.op("Exp", right, out="e")
    output = net.op("MatMul", left, right, out="scores")
    model = net.finish({"x": (FLOAT, [4, 4])}, output, 3)
    with pytest.raises(LabelsNotPermitted, match="'left', 'right'"):
        splitonnx.cut(model, at="h", tail_at=["left", "right"], check=False)


@pytest.mark.parametrize("tail", [None, "act3"])
def test_a_raw_input_leaves_only_by_its_name(tail: str | None) -> None:
    options: dict[str, Any] = {"tail_at": tail} if tail else {"send_labels": True}
    model = ZOO["chain"].build()
    with pytest.raises(InputsNotPermitted, match=r"raw input 'x'.*--send-input x") as caught:
        splitonnx.cut(model, at="x", **options)
    assert (caught.value.tensors, caught.value.inputs) == (["x"], ["x"])
    with pytest.raises(InputsNotPermitted):  # a pattern names tensors, not what may leave
        splitonnx.cut(model, at="x*", **options)
    sent = list_data_sent(splitonnx.cut(model, at="x", send_inputs=("x",), **options))
    assert "x@server" in sent


def test_a_mask_beside_the_cut_is_named_as_the_refusals_say() -> None:
    model = build_masked()
    with pytest.raises(NotACut) as refused:
        splitonnx.cut(model, at="h2", send_labels=True)
    (missing,) = re.findall(r"'([^']*)' would cross too", str(refused.value))
    (named,) = re.findall(r"--send-input (\w+)", str(refused.value))
    assert (missing, named) == ("scaled", "mask")
    with pytest.raises(InputsNotPermitted, match="'scaled', computed on a path without a layer of"):
        splitonnx.cut(model, at=["h2", "scaled"], send_labels=True)
    bundle = splitonnx.cut(model, at=["h2", missing], send_labels=True, send_inputs=[named])
    assert bundle.server is not None


@pytest.mark.parametrize("at", ["turned", "moved", "normal"])
def test_an_image_that_is_only_normalized_is_raw(at: str) -> None:
    net = Net()
    mean, deviation = net.weight("mean", 3, 1, 1), net.weight("deviation", 3, 1, 1)
    turned = net.op("Transpose", "image", out="turned", perm=[0, 3, 1, 2])
    moved = net.op("Sub", turned, mean, out="moved")
    normal = net.op("Div", moved, net.op("Exp", deviation, out="scale"), out="normal")
    hidden = net.op("Conv", normal, net.weight("kernel", 4, 3, 2, 2), out="c")
    flat = net.op("Flatten", net.op("Relu", hidden, out="r"), out="flat")
    output = net.op("MatMul", flat, net.weight("last", 36, 3), out="scores")
    model = net.finish({"image": (FLOAT, ["N", 4, 4, 3])}, output, 3)
    with pytest.raises(InputsNotPermitted, match=f"'{at}', computed .* raw input 'image'"):
        splitonnx.cut(model, at=at, send_labels=True)
    assert splitonnx.cut(model, at=at, send_labels=True, send_inputs=["image"]).server
    assert splitonnx.cut(model, at="c", send_labels=True).server


def test_what_a_layer_has_changed_on_every_path_is_not_raw() -> None:
    net = Net()
    masked = net.op("Mul", net.op("MatMul", "x", net.weight("w1", 4, 4), out="h1"), "mask", out="m")
    hidden = net.op("MatMul", masked, net.weight("w2", 4, 4), out="h2")
    output = net.op("MatMul", hidden, net.weight("w3", 4, 3), out="scores")
    model = net.finish({"x": (FLOAT, ["N", 4]), "mask": (FLOAT, ["N", 4])}, output, 3)
    assert list_data_sent(splitonnx.cut(model, at="h2", send_labels=True)) == {"labels@server"}


def beside_a_layer(net: Net) -> str:
    """Put the input beside what a layer made of it."""
    return net.op("Concat", net.op("MatMul", "x", net.weight("wq", 4, 4), out="a"), "x", out="q",
                  axis=1)  # fmt: skip


def added_to_a_layer(net: Net) -> str:
    return net.op("Add", net.op("MatMul", "x", net.weight("wq", 4, 4), out="a"), "x", out="q")


def chosen_beside_weights(net: Net) -> str:
    positive = net.op("Greater", "x", net.constant("zero", np.array(0, np.float32)), out="positive")
    return net.op("Where", positive, "x", net.weight("wq", 4), out="q")


def bounded_by_weights(net: Net) -> str:
    return net.op("Max", "x", net.weight("wq", 4), out="q")


def normalized_with_weights(net: Net) -> str:
    scale, bias = net.weight("scale", 4), net.weight("bias", 4)
    return net.op("LayerNormalization", "x", scale, bias, out="q")


@pytest.mark.parametrize(
    ("build", "width"),
    [
        (beside_a_layer, 8),
        (added_to_a_layer, 4),
        (chosen_beside_weights, 4),
        (bounded_by_weights, 4),
        (normalized_with_weights, 4),
    ],
)
def test_an_input_that_a_path_without_a_layer_reaches_is_raw(
    build: Callable[[Net], str], width: int
) -> None:
    net = Net()
    value = net.op("MatMul", build(net), net.weight("w1", width, 5), out="h")
    value = net.op("MatMul", net.op("Relu", value, out="r"), net.weight("w2", 5, 3), out="scores")
    model = net.finish({"x": (FLOAT, ["N", 4])}, value, 3)
    with pytest.raises(InputsNotPermitted, match=r"'q'.*'x'"):
        splitonnx.cut(model, at="q", tail_at="r")
    assert splitonnx.cut(model, at="q", tail_at="r", send_inputs=["x"]).server
    assert splitonnx.cut(model, at="h", tail_at="r").server


def test_a_gradient_that_holds_an_input_is_raw() -> None:
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w1", 4, 4), out="h")
    tail = net.op("MatMul", net.op("Relu", hidden, out="r"), net.weight("w2", 4, 4), out="t")
    model = net.finish({"x": (FLOAT, ["N", 4])}, net.op("Mul", tail, "x", out="y"), 4)
    with pytest.raises(InputsNotPermitted, match="'x', and the labels"):
        splitonnx.cut(model, at="h", tail_at="t", loss="mse")
    with pytest.raises(LabelsNotPermitted):
        splitonnx.cut(model, at="h", tail_at="t", loss="mse", send_inputs=["x"])
    permitted = {"send_inputs": ["x"], "send_labels": True}
    assert splitonnx.cut(model, at="h", tail_at="t", loss="mse", **permitted).server  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"at": "act1", "send_labels": True, "send_inputs": ["x"]}, "sends no raw input"),
        (
            {"at": "x", "send_labels": True, "send_inputs": ["x", "y"]},
            "names 'y'.*inputs of the model are 'x'",
        ),
        ({"at": "act1", "tail_at": "act3", "send_labels": True}, "does not send the labels"),
        ({"at": None, "send_labels": True}, "does not send the labels"),
        ({"at": None, "send_inputs": "x"}, "sends no raw input"),
    ],
)
def test_what_is_named_and_does_not_leave_is_refused(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        splitonnx.cut(ZOO["chain"].build(), **options)


def test_a_loss_of_the_model_itself_has_no_labels_to_name() -> None:
    net = Net()
    hidden = net.op("Relu", net.op("MatMul", "x", net.weight("w1", 4, 4), out="m1"), out="h")
    error = net.op("Sub", net.op("MatMul", hidden, net.weight("w2", 4, 1), out="p"), "y", out="d")
    output = net.op("ReduceMean", net.op("Mul", error, error, out="s"), out="mean", keepdims=0)
    graph = helper.make_graph(
        net.nodes,
        "own loss",
        [helper.make_tensor_value_info(n, FLOAT, ["N", w]) for n, w in (("x", 4), ("y", 1))],
        [helper.make_tensor_value_info(output, FLOAT, [])],
        net.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    options: dict[str, Any] = {"at": ["h", "y"], "loss": "from-model"}
    with pytest.raises(InputsNotPermitted, match="--send-input y"):
        splitonnx.cut(model, **options)
    bundle = splitonnx.cut(model, **options, send_inputs=["y"])
    assert list_data_sent(bundle) == {"y@server"}


def test_users_have_every_option_of_a_cut() -> None:
    asked = inspect.signature(permissions.cut).parameters
    made = inspect.signature(partitions.cut).parameters
    assert splitonnx.cut is permissions.cut
    assert set(asked) - set(made) == {"recompute", "send_inputs", "send_labels", "wire"}
    assert set(made) - set(asked) == {"approve"}
    assert all(asked[name] == made[name] for name in set(asked) & set(made))


def test_a_name_that_is_not_an_input_is_told_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="names 'nope', but the inputs of the model are 'a', 'b'"):
        splitonnx.cut(
            ZOO["two_inputs"].build(), at="both", send_inputs=["nope", "nope"], send_labels=True
        )


def build_behind(scale: Callable[[Net], str]) -> onnx.ModelProto:
    """Put the layers ``h`` and ``scores`` behind what makes ``q`` of an image with 3 channels."""
    net = Net()
    hidden = net.op("Conv", scale(net), net.weight("k1", 4, 3, 2, 2), out="h")
    flat = net.op("Flatten", net.op("Relu", hidden, out="r"), out="flat")
    output = net.op("MatMul", flat, net.weight("last", 36, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 3, 4, 4])}, output, 3)


def store(net: Net, array: np.ndarray) -> str:
    return net.constant("stored", array.astype(np.float32))


ONE_TO_ONE: dict[str, Callable[[Net], str]] = {
    "depthwise": lambda net: net.op("Conv", "x", net.weight("k0", 3, 1, 1, 1), out="q", group=3),
    "identity": lambda net: net.op("MatMul", "x", store(net, np.eye(4)), out="q"),
    "permutation": lambda net: net.op("MatMul", store(net, np.eye(4)[::-1]), "x", out="q"),
    "dirac": lambda net: net.op("Conv", "x", store(net, np.eye(3)[:, :, None, None]), out="q"),
    "einsum": lambda net: net.op("Einsum", "x", net.weight("s", 3), out="q",
                                 equation="nchw,c->nchw"),
    "einsum with an ellipsis": lambda net: net.op("Einsum", "x", store(net, np.eye(4)[::-1]),
                                                  out="q", equation="...i,ij->...j"),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_TO_ONE)
def test_what_is_only_scaled_or_permuted_is_raw_for_cut_inspect_and_explain(name: str) -> None:
    model = build_behind(ONE_TO_ONE[name])
    with pytest.raises(InputsNotPermitted, match=r"'q', computed .* raw input 'x'"):
        splitonnx.cut(model, at="q", send_labels=True)
    listed = {one.tensor: one.raw for one in splitonnx.inspect(model)}
    assert (listed["q"], listed["h"]) == (("x",), ())
    bundle = splitonnx.cut(model, at="q", send_labels=True, send_inputs=["x"])
    assert find_way(bundle, "x").is_bare
    mixed = find_way(splitonnx.cut(model, at="h", send_labels=True), "x")
    assert not mixed.is_bare
    assert [layer.node for layer in mixed.layers] == ["h_node"]


def find_way(bundle: splitonnx.Bundle, array: str) -> Dependence:
    """Return how the only tensor that leaves the client depends on an array, as explained."""
    (phase,) = (own for own in splitonnx.explain(bundle.client).phases if own.leaves.phase == TRAIN)
    (found,) = (own for own in phase.arrays if own.name == array)
    (way,) = found.ways
    return way.dependence


@pytest.mark.parametrize("target", ["training", "portable"])
def test_a_tail_that_only_scales_tells_the_labels_to_cut_and_explain(target: Target) -> None:
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w1", 4, 4), out="h")
    scores = net.op("MatMul", hidden, net.weight("w2", 4, 3), out="s")
    turned = net.constant("turn", np.eye(3, dtype=np.float32)[::-1] * 2)
    model = net.finish({"x": (FLOAT, ["N", 4])}, net.op("MatMul", scores, turned, out="y"), 3)
    options: dict[str, Any] = {"at": "h", "client_target": target, "check": False}
    with pytest.raises(LabelsNotPermitted, match="between the loss and 's'"):
        splitonnx.cut(model, tail_at="s", **options)
    permitted = splitonnx.cut(model, tail_at="s", send_labels=True, **options)
    assert find_way(permitted, "labels").tells_values


def test_a_raw_input_that_a_state_holds_leaves_a_step_later() -> None:
    """The state adds the input of the step before to what is sent."""

    def cut(**options: Any) -> splitonnx.Bundle:
        states = {"after": "before"}
        model = build_delayed()
        return splitonnx.cut(
            model, at="s", tail_at="z", loss="mse", dims={"N": 4}, states=states, **options
        )

    with pytest.raises(InputsNotPermitted, match=r"'s'.*--send-input x"):
        cut()
    bundle = cut(send_inputs=["x"])
    (array,) = [
        array
        for phase in splitonnx.explain(bundle.client).phases
        for array in phase.arrays
        if phase.leaves.phase == TRAIN and array.name == "x"
    ]
    assert [way.dependence.tells_values for way in array.ways] == [True]
    (found,) = [
        one
        for one in splitonnx.inspect(build_delayed(), dims={"N": 4}, states={"after": "before"})
        if one.tensor == "s"
    ]
    assert found.raw == ("x",)
