"""Labels that a model's own loss reads as an input, and the gradients that tell the server them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import splitonnx
from splitonnx.commands.pairs import print_pairs
from splitonnx.disclosures import list_sent
from splitonnx.errors import InputsNotPermitted
from splitonnx.names import TRAIN
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from tests.partitioner.test_permissions import find_told
from tests.support.recordings import RecordingTransport
from tests.support.zoo import FLOAT, Net


def build_with_own_loss() -> onnx.ModelProto:
    """Build layers that end in a mean squared error, whose labels are the input ``lab``."""
    net = Net()
    hidden = net.op("Tanh", net.op("Gemm", "x", net.weight("w1", 4, 5), out="g"), out="h")
    net.op("Gemm", hidden, net.weight("w2", 5, 2), out="pred")
    difference = net.op("Sub", "pred", "lab", out="d")
    net.op("ReduceMean", net.op("Mul", difference, difference, out="q"), out="loss", keepdims=0)
    model = net.finish({"x": (FLOAT, ["N", 4]), "lab": (FLOAT, ["N", 2])}, "pred", 2)
    model.graph.output.append(helper.make_tensor_value_info("loss", FLOAT, []))
    return model


def test_a_gradient_that_tells_the_labels_of_a_loss_in_the_model_is_marked() -> None:
    model = build_with_own_loss()
    options: dict[str, Any] = {"at": "g", "loss": "from-model", "output": "loss", "check": False}
    with pytest.raises(InputsNotPermitted) as refused:
        splitonnx.cut(model, tail_at="pred", **options)
    assert "send the gradient of 'pred', computed on a path" in str(refused.value)
    assert "--send-input lab" in str(refused.value)
    assert "earlier, with --tail-at" in str(refused.value)
    assert "@" not in str(refused.value)
    earlier = splitonnx.cut(model, tail_at="h", **options)  # as it says
    assert earlier.client.manifest.tells_labels == ()
    assert find_told(earlier) == set()
    bundle = splitonnx.cut(model, tail_at="pred", send_inputs=["lab"], **options)
    for party in bundle.parties.values():
        assert party.manifest.tells_labels == ("pred@client_grad",)
    (told,) = (t for t in list_sent(bundle.client.manifest, TRAIN).tensors if t.tells_labels)
    assert str(told).endswith("the server can compute the labels from it)")
    assert find_told(bundle) == {"pred"}

    random = np.random.default_rng(0)
    x, labels = (random.standard_normal((8, n)).astype(np.float32) for n in (4, 2))
    assert bundle.server is not None
    server = RecordingTransport(Executor(bundle.server, Engine(threads=1)))
    with splitonnx.Client(bundle.client, server, threads=1) as client:
        predicted = client.predict({"x": x})["pred"]
        client.step({"x": x, "lab": labels})
    sent = [tensors for step in server.sent[TRAIN].values() for tensors in step.items()]
    (gradient,) = (value for name, value in sent if name == "pred@client_grad")
    computed = predicted - gradient * predicted.size / 2  # by the server, which knows both
    np.testing.assert_allclose(computed, labels, atol=1e-5)


def build_regularized() -> onnx.ModelProto:
    """Build the same with the mean square of a layer added to the loss, which reads no labels."""
    model = build_with_own_loss()
    graph = model.graph
    graph.node[-1].output[0] = "error"
    graph.node.append(helper.make_node("Mul", ["pred", "pred"], ["square"]))
    graph.node.append(helper.make_node("ReduceMean", ["square"], ["size"], keepdims=0))
    graph.node.append(helper.make_node("Add", ["error", "size"], ["loss"]))
    return model


@pytest.mark.parametrize("build", [build_with_own_loss, build_regularized])
def test_pairs_that_tell_such_labels_are_those_for_which_cut_asks(
    build: Callable[[], onnx.ModelProto], capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"loss": "from-model", "output": "loss"}
    pairs = splitonnx.inspect_pairs(build(), **options)
    assert {pair.tells_labels for pair in pairs} == {True, False}
    for pair in pairs:
        told: set[str] = set()
        try:
            splitonnx.cut(build(), at=pair.at, tail_at=pair.tail_at, check=False, **options)
        except InputsNotPermitted as refused:
            if any(name.endswith("@client_grad") for name in refused.tensors):
                told = set(refused.inputs)
        assert (set(pair.tells_inputs), pair.tells_labels) == (told, bool(told))
    print_pairs(pairs, is_end_named=True)
    printed = capsys.readouterr().out
    assert "cut asks for --send-input lab" in printed
    assert "--send-labels" not in printed
