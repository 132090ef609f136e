"""What is listed where a loss is part of the model: exactly the cuts that can be made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import pytest
from onnx import ModelProto, helper
from onnx.checker import check_model

from splitonnx.errors import CutError, UnsupportedModel, UsageError
from splitonnx.losses import Loss
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.legal_cuts import ReadOutputs, find_read_outputs
from splitonnx.partitioner.partitions import cut_prepared
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.inspections import inspect, list_cuts
from splitonnx.partitioner.reports.u_shapes.pairs import list_pairs
from tests.support.nets import FLOAT, INT64, Net

Described = Mapping[str, tuple[int, Sequence[int | str]]]


def close(net: Net, inputs: Described, outputs: Described) -> ModelProto:
    """Close a model that has several outputs."""
    given, made = (
        [
            helper.make_tensor_value_info(name, kind, list(dims))
            for name, (kind, dims) in described.items()
        ]
        for described in (inputs, outputs)
    )
    graph = helper.make_graph(net.nodes, "net", given, made, net.weights)
    opsets = [helper.make_opsetid("", net.opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    check_model(model, full_check=True)
    return model


def build_classifier(*results: str, loss: str = "SoftmaxCrossEntropyLoss") -> ModelProto:
    """Two layers, and the cross-entropy of their scores with ``y``, as one node or two."""
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w1", 4, 6), out="product")
    hidden = net.op("Tanh", hidden, out="hidden")
    scores = net.op("MatMul", hidden, net.weight("w2", 6, 3), out="scores")
    if loss == "NegativeLogLikelihoodLoss":
        scores = net.op("LogSoftmax", scores, out="logs")
    net.op(loss, scores, "y", out="cost")
    inputs: Described = {"x": (FLOAT, ["N", 4]), "y": (INT64, ["N"])}
    outputs: Described = {"cost": (FLOAT, []), "scores": (FLOAT, ["N", 3])}
    return close(net, inputs, {name: outputs[name] for name in results})


def build_masked() -> ModelProto:
    """A network that reads a mask before and behind its second layer, and a loss of its own."""
    net = Net()
    first = net.op("MatMul", "x", net.weight("w1", 4, 4), out="product")
    masked = net.op("Mul", first, "mask", out="masked")
    second = net.op("MatMul", masked, net.weight("w2", 4, 4), out="second")
    net.op("Mul", second, "mask", out="made")
    gap = net.op("Sub", "made", "target", out="gap")
    square = net.op("Mul", gap, gap, out="square")
    net.op("ReduceMean", square, out="cost", keepdims=0)
    inputs: Described = {name: (FLOAT, ["N", 4]) for name in ("x", "mask", "target")}
    return close(net, inputs, {"made": (FLOAT, ["N", 4]), "cost": (FLOAT, [])})


MODELS = {
    "the loss alone": (build_classifier("cost"), ("y",)),
    "scores and loss": (build_classifier("scores", "cost"), ("y",)),
    "loss of two nodes": (
        build_classifier("scores", "cost", loss="NegativeLogLikelihoodLoss"),
        ("y",),
    ),
    "a mask": (build_masked(), ("mask", "target")),
}


def prepare_named(name: str) -> tuple[PreparedModel, tuple[str, ...]]:
    model, sent = MODELS[name]
    return prepare(open_model(model)), sent


def can_cut(prepared: PreparedModel, at: Sequence[str], tail_at: Sequence[str] = ()) -> bool:
    try:
        cut_prepared(prepared, at=at, tail_at=tail_at, loss="from-model", output="cost")
    except CutError:
        return False
    return True


def list_made(prepared: PreparedModel) -> list[str]:
    return [value.name or "" for node in prepared.inference.graph for value in node.outputs]


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_that_is_listed_can_be_cut_at_and_no_other(name: str) -> None:
    prepared, sent = prepare_named(name)
    reads = find_read_outputs(prepared, "from-model", "cost")
    listed = {
        each.tensor: (each.tensor, *each.sent) for each in list_cuts(prepared, None, sent, reads)
    }
    assert listed
    for tensor in list_made(prepared):
        beside = [[], *([one] for one in sent), list(sent)]
        possible = any(can_cut(prepared, [tensor, *names]) for names in beside)
        assert possible == (tensor in listed), tensor
        if tensor in listed:
            assert can_cut(prepared, listed[tensor]), listed[tensor]


@pytest.mark.parametrize("name", MODELS)
def test_every_pair_that_is_listed_can_be_cut_at_and_no_other(name: str) -> None:
    prepared, sent = prepare_named(name)
    found = list_pairs(prepared, sent=sent, output="cost", loss="from-model")
    listed = {(each.at[0], each.tail_at[0]): each.at for each in found}
    assert listed
    tensors = list_made(prepared)
    for first, last in product(tensors, tensors):
        at = listed.get((first, last))
        if at is not None:
            assert can_cut(prepared, at, [last]), (at, last)
            continue
        beside = [[], *([one] for one in sent), list(sent)]
        assert not any(can_cut(prepared, [first, *names], [last]) for names in beside), (
            first,
            last,
        )


def test_scores_before_their_own_loss_are_no_cut_where_they_are_predicted() -> None:
    model = build_classifier("scores", "cost")
    listed = [each.tensor for each in inspect(model, sent=["y"], output="cost")]
    assert listed == ["product", "hidden"]
    alone = inspect(build_classifier("cost"), sent=["y"])
    assert [each.tensor for each in alone] == ["product", "hidden", "scores"]


def test_a_cut_without_its_own_loss_names_the_labels_that_training_reads() -> None:
    first, *_ = inspect(build_classifier("scores", "cost"), sent=["y"], output="cost", batch=2)
    assert first.sent == ("y",)
    assert first.bytes_up == 2 * 6 * 4 + 2 * 8


def test_an_output_that_is_no_scalar_is_refused_as_a_loss_of_the_model() -> None:
    with pytest.raises(UnsupportedModel, match="a loss is a float32 scalar"):
        inspect(build_classifier("scores", "cost"), loss="from-model")
    with pytest.raises(UsageError, match="there is no loss 'none'"):
        inspect(build_classifier("scores", "cost"), loss="none")


def test_check_lists_the_cuts_of_the_loss_that_it_tried() -> None:
    model = build_masked()
    tried = check(model, loss="from-model", output="cost")
    assert tried.trainable
    assert [each.tensor for each in tried.cuts] == [
        each.tensor for each in inspect(model, loss="from-model", output="cost")
    ]


def test_scores_of_several_losses_divide_the_model_before_all_of_them() -> None:
    net = Net()
    shared = net.op("MatMul", "x", net.weight("w", 4, 5), out="shared")
    net.op("MatMul", shared, net.weight("a", 5, 2), out="first")
    net.op("MatMul", net.op("Tanh", shared, out="bent"), net.weight("b", 5, 3), out="second")
    model = close(
        net, {"x": (FLOAT, ["N", 4])}, {"first": (FLOAT, ["N", 2]), "second": (FLOAT, ["N", 3])}
    )
    prepared = prepare(open_model(model))
    losses = [Loss(kind="mse", output="first"), Loss(kind="l1", output="second")]
    reads = find_read_outputs(prepared, losses, None)
    assert reads == ReadOutputs(names=("first", "second"))
    (found,) = list_cuts(prepared, None, (), reads)
    assert found.tensor == "shared"
    assert (found.client_parameters, found.server_parameters) == (4 * 5, 5 * 2 + 5 * 3)
