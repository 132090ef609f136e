"""What a refused cut advises was tried: every tensor named is the model's own, and is taken."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from splitonnx.errors import NotACut
from splitonnx.partitioner.cutting.passes.given_names import list_names
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut_prepared
from tests.support.zoo import FLOAT, INT64, Net


def build_skip() -> onnx.ModelProto:
    """A skip connection around a rewritten operator."""
    net = Net()
    net.op("Elu", net.op("MatMul", "x", net.weight("w1", 6, 5), out="h1"), out="h2")
    net.op("Softplus", net.op("MatMul", "h2", net.weight("w2", 5, 5), out="h3"), out="h4")
    net.op("Add", "h4", "h2", out="h5")
    net.op("MatMul", "h5", net.weight("w3", 5, 3), out="y")
    return net.finish({"x": (FLOAT, ["N", 6])}, "y", 3)


def build_unpooled() -> onnx.ModelProto:
    """A MaxUnpool, whose rewrite reads the places of a MaxPool through tensors of its own."""
    net = Net()
    net.op("Conv", "x", net.weight("k", 4, 3, 3, 3), out="maps")
    sizes = {"kernel_shape": [2, 2], "strides": [2, 2]}
    net.op("MaxPool", "maps", out="top", **sizes)
    net.nodes[-1].output.append("places")
    net.op("MaxUnpool", "top", "places", out="wide", **sizes)
    net.op("Flatten", "wide", out="flat")
    net.op("MatMul", "flat", net.weight("w", 144, 3), out="y")
    return net.finish({"x": (FLOAT, ["N", 3, 8, 8])}, "y", 3)


def refuse(prepared: PreparedModel, at: tuple[str, ...], tail_at: tuple[str, ...] = ()) -> NotACut:
    with pytest.raises(NotACut) as caught:
        cut_prepared(prepared, at=at, tail_at=tail_at, loss="mse")
    return caught.value


def test_what_would_cross_too_makes_a_cut_when_it_is_added() -> None:
    prepared = prepare(open_model(build_skip()))
    error = refuse(prepared, ("h3",))
    assert (error.missing, error.others) == (["h2"], ["h2", "h5"])
    assert "name it with --at as well, or cut at 'h2' or 'h5' instead" in str(error)
    cut_prepared(prepared, at=("h3", *error.missing), loss="mse")
    for other in error.others:
        cut_prepared(prepared, at=other, loss="mse")


def test_what_would_come_back_too_is_added_to_the_tail() -> None:
    prepared = prepare(open_model(build_skip()))
    error = refuse(prepared, ("h1",), ("h3",))
    assert (error.missing, error.is_back) == (["h2"], True)
    assert "name it with --tail-at as well" in str(error)
    cut_prepared(prepared, at="h1", tail_at=("h3", *error.missing), loss="mse")


def test_tensors_of_a_rewrite_are_not_advised() -> None:
    model = build_unpooled()
    prepared = prepare(open_model(model))
    error = refuse(prepared, ("top",))
    given = {name for node in model.graph.node for name in node.output}
    assert not error.missing
    assert "other tensors would cross too; 'maps' or 'wide' would divide it" in str(error)
    assert set(error.others) <= given
    for other in error.others:
        cut_prepared(prepared, at=other, loss="mse")


def test_an_input_that_would_cross_is_advised_with_the_option_that_lets_it() -> None:
    net = Net()
    net.op("Tanh", net.op("MatMul", "x", net.weight("w1", 6, 5), out="h"), out="t")
    net.op("Mul", "t", "mask", out="masked")
    net.op("MatMul", "masked", net.weight("w2", 5, 3), out="y")
    model = net.finish({"x": (FLOAT, ["N", 6]), "mask": (FLOAT, ["N", 5])}, "y", 3)
    error = refuse(prepare(open_model(model)), ("h",))
    assert (error.missing, error.raw, error.others) == (["mask"], ["mask"], ["masked"])


def test_other_refusals_name_a_tensor_that_divides_the_model() -> None:
    prepared = prepare(open_model(build_skip()))
    for at in (("w1",), ("y",), ("h1", "h2")):
        for other in refuse(prepared, at).others:
            cut_prepared(prepared, at=other, loss="mse")
    assert refuse(prepared, ("w1",)).others == ["h1"]


def test_the_names_given_are_those_of_the_file() -> None:
    model = build_skip()
    prepared = prepare(open_model(model))
    tensors = {name for node in model.graph.node for name in (*node.input, *node.output)}
    assert prepared.given == tensors | {node.name for node in model.graph.node}
    assert list_names(prepared.training.graph) - prepared.given
    assert np.array_equal(prepared.weights["w3"].numpy().shape, (5, 3))


def test_an_input_with_one_value_is_advised_to_be_bound() -> None:
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w1", 4, 6), out="h")
    start, axis = net.constant("start", np.array([0])), net.constant("axis", np.array([1]))
    part = net.op("Slice", hidden, start, "end", axis, out="part")
    net.op("ReduceSum", net.op("Tanh", part, out="t"), axis, out="y", keepdims=1)
    model = net.finish({"x": (FLOAT, ["N", 4]), "end": (INT64, [1])}, "y", 1)
    error = refuse(prepare(open_model(model)), ("h",))
    assert (error.raw, error.settings) == (["end"], ["end"])
    assert "or fix it with --bind end=VALUE" in str(error)
