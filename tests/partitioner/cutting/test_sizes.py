"""Sizes beyond a cut are told from the cut's own shape: no integer travels, any batch fits."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.bundles import Bundle
from splitonnx.errors import NotACut, SharedParameter, UsageError
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.verifications import verify
from tests.support.zoo import FLOAT, INT64, ZOO, Net

CUTS = [found.tensor for found in inspect(ZOO["shape_paths"].build())]


def list_wires(bundle: Bundle) -> dict[str, str]:
    """Map every wire of every phase to its dtype; labels and reports apart."""
    assert bundle.server is not None
    phases = [bundle.server.manifest.phase(name) for name in ("train", "predict")]
    return {
        wire.tensor.name: wire.tensor.dtype
        for phase in phases
        for wire in phase.wires
        if wire.tensor.name != "labels@server"
    }


def make_sequences(samples: int, length: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(length)
    x = random.standard_normal((samples, length, 6), np.float32)
    return {"x": x, "labels": random.integers(0, 3, samples)}


def test_tensors_beyond_which_a_far_shape_is_read_are_listed_as_cuts() -> None:
    assert CUTS == ["m0", "joined", "placed", "t1", "sum", "mean", "scaled", "viewed"]


@pytest.mark.parametrize(("first", "last"), [*((c, "") for c in CUTS), *combinations(CUTS, 2)])
def test_no_integer_travels_wherever_sizes_are_read(first: str, last: str) -> None:
    bundle = cut(ZOO["shape_paths"].build(), at=first, tail_at=last or ())
    assert set(list_wires(bundle).values()) == {"F32"}


@pytest.mark.parametrize("tail", [(), "scaled"])
@pytest.mark.parametrize("target", ["training", "portable"])
def test_one_bundle_takes_any_batch_and_any_length(tail: str, target: str) -> None:
    bundle = cut(
        ZOO["shape_paths"].build(),
        at="placed",
        tail_at=tail,
        client_target=target,  # type: ignore[arg-type]
        server_target=target,  # type: ignore[arg-type]
    )
    for samples, length in ((6, 4), (4, 7), (2, 1)):
        data = make_sequences(samples, length)
        assert verify(bundle, data, batch_size=samples // 2).largest_difference == 0.0


def add_mask(net: Net) -> str:
    """An attention mask as BERT makes it of its second input: 0 where to look, -10000 elsewhere."""
    one, low = (net.constant(n, np.array(v, np.float32)) for n, v in (("one", 1), ("low", -1e4)))
    middle = net.constant("middle", np.array([1]))
    raised = net.op("Unsqueeze", "mask", middle, out="raised")
    seen = net.op("Cast", raised, out="seen", to=TensorProto.FLOAT)
    return net.op("Mul", net.op("Sub", one, seen, out="hidden"), low, out="bias")


def add_layer(net: Net, value: str, bias: str, name: str) -> str:
    keys = net.op("Transpose", value, out=f"{name}.keys", perm=[0, 2, 1])
    query = net.op("MatMul", value, net.weight(f"{name}.w", 6, 6), out=f"{name}.query")
    products = net.op("MatMul", query, keys, out=f"{name}.products")
    weights = net.op("Add", products, bias, out=f"{name}.biased")
    weights = net.op("Softmax", weights, out=f"{name}.weights", axis=-1)
    mixed = net.op("MatMul", weights, value, out=f"{name}.mixed")
    return net.op("Tanh", net.op("Add", mixed, value, out=f"{name}.sum"), out=name)


def build_masked(layers: int = 3) -> onnx.ModelProto:
    net = Net()
    bias = add_mask(net)
    value = net.op("Gather", net.weight("table", 11, 6), "tokens", out="embedded")
    for index in range(layers):
        value = add_layer(net, value, bias, f"layer{index}")
    value = net.op("ReduceMean", value, net.constant("seq", np.array([1])), out="mean", keepdims=0)
    output = net.op("MatMul", value, net.weight("w", 6, 3), out="scores")
    inputs = {"tokens": (INT64, ["N", "T"]), "mask": (INT64, ["N", "T"])}
    return net.finish(inputs, output, 3)


def make_masked(samples: int, length: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(length)
    return {
        "tokens": random.integers(0, 11, (samples, length)),
        "mask": random.integers(0, 2, (samples, length)),
        "labels": random.integers(0, 3, samples),
    }


def test_a_mask_made_of_a_raw_input_crosses_only_by_name() -> None:
    with pytest.raises(
        NotACut, match=r"'bias' would cross too \(of the raw input 'mask'"
    ) as caught:
        cut(build_masked(), at="layer0")
    assert caught.value.missing == ["bias"]
    assert caught.value.raw == ["mask"]


@pytest.mark.parametrize("tail", [(), "layer1"])
@pytest.mark.parametrize("named", ["bias", "mask", "seen"])
def test_a_named_mask_crosses_without_a_gradient(named: str, tail: str) -> None:
    bundle = cut(build_masked(), at=["layer0", named], tail_at=tail)
    for samples, length in ((8, 5), (6, 3)):
        data = make_masked(samples, length)
        assert verify(bundle, data, batch_size=samples // 2).largest_difference == 0.0
    wires = list_wires(bundle)
    assert f"{named}@server" in wires
    assert f"{named}@server_grad" not in wires
    assert not {"tokens@server", "bias@client"} & set(wires)


def test_cuts_beside_which_a_mask_crosses_are_listed_on_demand() -> None:
    model = build_masked()
    assert [found.tensor for found in inspect(model)] == ["layer2.sum", "layer2", "mean"]
    cuts = {found.tensor: found for found in inspect(model, batch=4, sent=["mask"])}
    beside = {tensor: found.sent for tensor, found in cuts.items()}
    assert beside == {
        "embedded": ("mask",), "layer0.sum": ("mask",), "layer0": ("mask",),
        "layer1.sum": ("mask",), "layer1": ("mask",), "layer2.sum": (), "layer2": (), "mean": (),
    }  # fmt: skip
    for tensor, sent in beside.items():
        assert cut(model, at=[tensor, *sent]).server is not None
    assert cuts["mean"].bytes_up == 4 * 6 * 4
    assert cuts["layer0"].bytes_up is None  # the length is not known
    with pytest.raises(UsageError, match="'bias' is not an input"):
        inspect(model, sent=["bias"])


def build_with_sizes(target: list[str], *, back: list[str]) -> onnx.ModelProto:
    """A layer between two reshapes; ``n`` and ``t`` stand for sizes of the input."""
    net = Net()
    for index, name in enumerate(("n", "t")):
        place = net.constant(f"{name}.place", np.array([index]))
        net.op("Gather", net.op("Shape", "x", out=f"{name}.shape"), place, out=name, axis=0)
    for size in {*target, *back} - {"n", "t"}:
        net.constant(size, np.array([int(size)]))
    value = net.op("MatMul", "x", net.weight("w0", 6, 6), out="m0")
    value = net.op("Reshape", value, net.op("Concat", *target, out="to", axis=0), out="flat")
    value = net.op("Tanh", value, out="bent")
    value = net.op("Reshape", value, net.op("Concat", *back, out="from", axis=0), out="again")
    value = net.op("ReduceMean", value, net.constant("seq", np.array([1])), out="mean", keepdims=0)
    output = net.op("MatMul", value, net.weight("w1", 6, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", "T", 6])}, output, 3)


def test_a_size_that_no_cut_tensor_has_is_named() -> None:
    model = build_with_sizes(["-1", "6"], back=["n", "t", "6"])
    with pytest.raises(NotACut, match=r"a size of 'x' is needed \(N\) that no tensor of the cut"):
        cut(model, at="bent")
    assert [found.tensor for found in inspect(model)] == ["m0", "again", "mean"]


def test_a_size_is_told_from_a_multiple_of_it() -> None:
    model = build_with_sizes(["-1", "t", "3"], back=["n", "-1", "6"])
    bundle = cut(model, at="flat", tail_at="mean")
    assert set(list_wires(bundle).values()) == {"F32"}
    for samples, length in ((6, 4), (4, 7)):
        data = make_sequences(samples, length)
        assert verify(bundle, data, batch_size=samples // 2).largest_difference == 0.0


def test_what_is_drawn_at_random_is_never_drawn_twice() -> None:
    net = Net()
    value = net.op("Tanh", net.op("MatMul", "x", net.weight("w0", 6, 6), out="m0"), out="t0")
    noise = net.op("RandomUniformLike", value, out="noise")
    value = net.op("Add", value, noise, out="noisy")
    value = net.op("Tanh", net.op("MatMul", value, net.weight("w1", 6, 6), out="m1"), out="t1")
    value = net.op("Mul", value, noise, out="gated")
    output = net.op("MatMul", value, net.weight("w2", 6, 3), out="scores")
    model = net.finish({"x": (FLOAT, ["N", 6])}, output, 3)
    with pytest.raises(NotACut, match="'noise' would cross too; 't0' or 'gated' would divide it"):
        cut(model, at="t1")


def test_a_parameter_that_is_expanded_to_the_batch_has_one_owner() -> None:
    model = ZOO["shape_paths"].build()
    bundle = cut(model, at="placed", tail_at="sum")
    assert bundle.server is not None
    assert set(bundle.server.weights) == {"wq"}
    assert {"token", "scale"} <= set(bundle.client.weights)
    twice = helper.make_node("Mul", ["viewed", "scales"], ["again"], name="again_node")
    model.graph.node.insert(len(model.graph.node) - 1, twice)
    model.graph.node[-1].input[0] = "again"
    assert cut(model, at="sum").server is not None
    with pytest.raises(SharedParameter, match="'scale'"):
        cut(model, at="viewed")


def test_a_constant_initializer_of_shapes_needs_no_deriving() -> None:
    model = ZOO["shape_paths"].build()
    fixed = numpy_helper.from_array(np.array([0, -1]), "fixed")
    model.graph.initializer.append(fixed)
    next(n for n in model.graph.node if n.output[0] == "viewed").input[1] = "fixed"
    assert verify(cut(model, at="sum"), make_sequences(4, 3), batch_size=2).largest_difference == 0
