"""The list of a model's cuts: what each is, what travels, and which parameters lie where."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from splitonnx.bundles import PartyBundle
from splitonnx.disclosures import list_sent
from splitonnx.errors import (
    InputsNotPermitted,
    NotAModel,
    NotDifferentiable,
    UnknownTensor,
    UsageError,
)
from splitonnx.names import TRAIN
from splitonnx.partitioner import permissions
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.inspections import CutCandidate, advise_sent, inspect
from splitonnx.partitioner.reports.u_shapes.pairs import inspect_pairs
from tests.support.small_models import load_model
from tests.support.zoo import FLOAT, INT64, ZOO, Net


def list_by_name(name: str, batch: int | None = None) -> dict[str, CutCandidate]:
    return {each.tensor: each for each in inspect(ZOO[name].build(), batch=batch)}


def test_the_cuts_of_a_chain_go_from_its_input_to_its_output() -> None:
    found = inspect(ZOO["chain"].build())
    made = [output for node in ZOO["chain"].build().graph.node for output in node.output]
    assert [each.tensor for each in found] == made[:-1]
    assert [each.op for each in found] == [
        node.op_type for node in ZOO["chain"].build().graph.node
    ][:-1]


def test_parameters_are_counted_on_both_sides() -> None:
    model = ZOO["chain"].build()
    total = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    found = inspect(model)
    assert all(each.client_parameters + each.server_parameters == total for each in found)
    counts = [each.client_parameters for each in found]
    assert counts == sorted(counts)
    first = {t.name: math.prod(t.dims) for t in model.graph.initializer}
    assert counts[0] == first["w0"] + first["b0"]


def test_bytes_are_known_where_the_batch_is() -> None:
    unknown, known = list_by_name("chain"), list_by_name("chain", batch=16)
    assert unknown.keys() == known.keys()
    assert unknown["act0"].bytes_up is None
    width = known["act0"].shape[1]
    assert isinstance(width, int)
    assert known["act0"].shape == (16, width)
    assert known["act0"].bytes_up == known["act0"].bytes_down == 16 * width * 4


def test_nothing_comes_back_where_nothing_before_the_cut_is_trained() -> None:
    net = Net()
    net.op("Tanh", "x", out="bent")
    net.op("Relu", net.op("MatMul", "bent", net.weight("w", 6, 5), out="product"), out="y")
    model = net.finish({"x": (FLOAT, ["N", 6])}, "y", 5)
    bent, product = inspect(model, batch=2)
    assert (bent.bytes_up, bent.bytes_down, bent.client_parameters) == (48, 0, 0)
    assert (product.bytes_up, product.bytes_down, product.client_parameters) == (40, 40, 30)


def test_a_skip_connection_hides_what_it_leads_around() -> None:
    assert list(list_by_name("residual")) == ["m1", "r1", "sum", "r3"]


def test_every_cut_that_is_listed_can_be_made() -> None:
    entry = ZOO["residual"]
    for each in inspect(entry.build()):
        bundle = cut(entry.build(), at=each.tensor, loss=entry.loss)
        assert bundle.server is not None


def test_a_raw_input_may_cross_beside_the_tensor_if_it_is_named() -> None:
    net = Net()
    hidden = net.op("Tanh", net.op("MatMul", "x", net.weight("w1", 6, 5), out="h"), out="t")
    masked = net.op("Mul", hidden, "mask", out="masked")
    net.op("MatMul", masked, net.weight("w2", 5, 3), out="y")
    model = net.finish({"x": (FLOAT, ["N", 6]), "mask": (FLOAT, ["N", 5])}, "y", 3)
    assert [each.tensor for each in inspect(model)] == ["masked"]
    beside = {each.tensor: each for each in inspect(model, sent=["mask"], batch=2)}
    assert {name: each.sent for name, each in beside.items()} == {
        "h": ("mask",), "t": ("mask",), "masked": (),
    }  # fmt: skip
    assert (beside["t"].bytes_up, beside["t"].bytes_down) == (2 * 2 * 5 * 4, 2 * 5 * 4)
    assert cut(model, at=["t", "mask"], loss="mse").server is not None


def build_attention() -> ModelProto:
    """Two layers of attention over a sequence of any length, both behind one mask of tokens."""
    net = Net()
    hidden = net.op("Gather", net.weight("table", 20, 8), "ids", out="embedded")
    mask = net.op("Cast", "mask", out="kept", to=TensorProto.FLOAT)
    mask = net.op("Unsqueeze", net.op("Log", mask, out="bias"), net.constant("one", np.array([1])),
                  out="row")  # fmt: skip
    for i in range(2):
        keys = net.op("Transpose", hidden, out=f"k{i}", perm=[0, 2, 1])
        asked = net.op("MatMul", hidden, net.weight(f"q{i}", 8, 8), out=f"asked{i}")
        scores = net.op("Add", net.op("MatMul", asked, keys, out=f"s{i}"), mask, out=f"m{i}")
        shares = net.op("Softmax", scores, out=f"shares{i}", axis=-1)
        mixed = net.op("MatMul", net.op("MatMul", shares, hidden, out=f"mixed{i}"),
                       net.weight(f"o{i}", 8, 8), out=f"o{i}x")  # fmt: skip
        hidden = net.op("Add", hidden, mixed, out=f"block{i}")
    pooled = net.op("ReduceMean", hidden, net.constant("axis", np.array([1])), out="pooled",
                    keepdims=0)  # fmt: skip
    net.op("MatMul", pooled, net.weight("last", 8, 3), out="y")
    return net.finish({"ids": (INT64, ["N", "T"]), "mask": (INT64, ["N", "T"])}, "y", 3)


def test_blocks_behind_a_mask_are_listed_with_it_and_their_bytes_with_a_length() -> None:
    model = build_attention()
    assert next(each.tensor for each in inspect(model)) == "block1"
    dims = {"T": 128}
    found = {each.tensor: each for each in inspect(model, sent=["mask"], batch=4, dims=dims)}
    assert [name for name in found if found[name].sent == ("mask",)] == ["embedded", "block0"]
    assert found["block0"].shape == (4, 128, 8)
    at = ("block0", "mask")
    manifest = cut(model, at=at, dims=dims).client.manifest
    tensors = list_sent(manifest, TRAIN, batch=4).tensors
    assert found["block0"].bytes_up == sum(t.bytes or 0 for t in tensors if t.tensor in at)
    assert found["block0"].bytes_down == 4 * 128 * 8 * 4
    assert inspect(model, sent=["mask"], batch=4)[0].bytes_up is None


def test_what_is_no_input_cannot_be_sent() -> None:
    model = ZOO["two_inputs"].build()
    with pytest.raises(UsageError, match="'both' is not an input"):
        inspect(model, sent=["both"])
    with pytest.raises(UsageError, match="'wa' is not an input"):
        inspect(model, sent=["wa"])
    with pytest.raises(UnknownTensor, match="'nowhere'"):
        inspect(model, sent=["nowhere"])


def test_an_integer_behind_trained_parameters_is_no_cut() -> None:
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w", 6, 5), out="hidden")
    picked = net.op("Cast", net.op("ArgMax", hidden, out="places", axis=1), out="numbers",
                    to=TensorProto.INT32)  # fmt: skip
    net.op("Gather", net.weight("table", 5, 3), picked, out="rows")
    net.op("Squeeze", "rows", net.constant("axis", np.array([1])), out="y")
    graph = helper.make_graph(
        net.nodes, "picks", [helper.make_tensor_value_info("x", FLOAT, ["N", 6])],
        [helper.make_tensor_value_info("y", FLOAT, ["N", 3])], net.weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    tensors = {each.tensor for each in inspect(model)}
    assert not tensors & {"places", "numbers"}
    assert tensors & {"hidden", "rows"}


def test_a_tensor_of_unknown_rank_is_no_cut() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 6, 1), out="column")
    net.op("Squeeze", "column", out="row")  # a batch of one would lose its axis as well
    net.op("Mul", "row", net.weight("scale", 1), out="y")
    model = net.finish({"x": (FLOAT, ["N", 6])}, "y")
    listed = [each.tensor for each in inspect(model)]
    assert listed == ["column"]
    cut(model, at="column", loss="mse")


def test_a_tensor_that_a_body_reads_is_no_cut() -> None:
    net = Net()
    net.op("Tanh", "x", out="hidden")
    net.op("ReduceMax", "x", out="top", keepdims=0)
    net.op("Greater", "top", net.constant("bar", np.array(0.5, np.float32)), out="is_high")
    bodies = [
        helper.make_graph(
            [helper.make_node(kind, ["hidden"], [kind])], kind, [],
            [helper.make_tensor_value_info(kind, FLOAT, ["N", 6])],
        )
        for kind in ("Relu", "Neg")
    ]  # fmt: skip
    net.op("If", "is_high", out="chosen", then_branch=bodies[0], else_branch=bodies[1])
    net.op("Mul", "chosen", net.weight("scale", 6), out="y")
    model = net.finish({"x": (FLOAT, ["N", 6])}, "y", 6)
    for each in inspect(model, sent=["x"]):
        cut(model, at=[each.tensor, *each.sent], loss="mse")


def build_choice(source: str, *, noisy: bool = False) -> onnx.ModelProto:
    """A branch chosen by the size T, which reads ``source``: ``x``, or what weights made of it.

    ``noisy`` means that it draws random numbers, so that no gradient can pass through.
    """
    noise = [helper.make_node("RandomNormalLike", ["x"], ["noise"])] if noisy else []
    net = Net()
    net.op("MatMul", "x", net.weight("w1", 4, 4), out="hidden")
    net.op("Gather", net.op("Shape", "x", out="sizes"), net.constant("one", np.array(1)), out="t")
    net.op("Greater", "t", net.constant("three", np.array(3)), out="is_long")
    bodies = [
        helper.make_graph(
            [*noise, helper.make_node(kind, [source], [kind])], kind, [],
            [helper.make_tensor_value_info(kind, FLOAT, None)],
        )
        for kind in ("Tanh", "Sigmoid")
    ]  # fmt: skip
    net.op("If", "is_long", out="chosen", then_branch=bodies[0], else_branch=bodies[1])
    net.op("Add", "chosen", "hidden", out="sum")
    net.op("MatMul", "sum", net.weight("w2", 4, 3), out="y")
    return net.finish({"x": (FLOAT, ["N", "T", 4])}, "y", "T", 3)


def test_where_a_size_chooses_a_branch_that_draws_numbers_no_cut_is_listed_and_none_taken() -> None:
    model = build_choice("hidden", noisy=True)
    expected = r"'chosen_node' \(If\).*depends on the size 'T', which --dim T=SIZE fixes"
    with pytest.raises(NotDifferentiable, match=expected):
        inspect(model)
    assert check(model).cuts == ()
    for tensor in ("hidden", "chosen", "sum"):
        with pytest.raises(NotDifferentiable, match=expected):
            cut(model, at=tensor, loss="mse")
    listed = [each.tensor for each in inspect(model, dims={"T": 5})]
    assert listed == ["hidden", "sum"]
    for tensor in listed:
        cut(model, at=tensor, loss="mse", dims={"T": 5})


def test_where_nothing_is_trained_no_cut_is_listed_and_none_taken() -> None:
    net = Net()
    net.op("Tanh", net.op("Relu", "x", out="h"), out="y")
    model = net.finish({"x": (FLOAT, ["N", 6])}, "y", 6)
    for refused in (partial(inspect, model), partial(cut, model, at="h", loss="mse")):
        with pytest.raises(UsageError, match="nothing is left to train"):
            refused()
    assert check(model).cuts == ()


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(NotAModel):
        inspect(b"no model at all")


def test_a_batch_that_contradicts_a_fixed_one_is_refused() -> None:
    model = ZOO["chain"].build()
    with pytest.raises(UsageError, match="--batch 3: the batch of 'x' is fixed at 4"):
        inspect(model, batch=3, dims={"N": 4})
    assert inspect(model, batch=4, dims={"N": 4})


def build_step_and_heads() -> ModelProto:
    """Build a layer before a step function, a shared layer, and two outputs."""
    net = Net()
    step = net.op("Floor", net.op("MatMul", "x", net.weight("w1", 6, 8), out="m"), out="step")
    shared = net.op("Tanh", net.op("MatMul", step, net.weight("w2", 8, 4), out="n"), out="shared")
    net.op("MatMul", shared, net.weight("v", 4, 2), out="z")
    model = net.finish({"x": (FLOAT, ["N", 6])}, net.op("MatMul", shared, net.weight("u", 4, 3),
                       out="y"), 3)  # fmt: skip
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, ["N", 2]))
    return model


def count_trained(party: PartyBundle) -> int:
    trained = [spec.tensor.name for spec in party.manifest.state if spec.role == "parameter"]
    return sum(party.weights[name].size for name in trained)


@pytest.mark.parametrize("output", ["y", "z"])
def test_only_parameters_with_a_gradient_from_the_output_are_counted(output: str) -> None:
    model = build_step_and_heads()
    found = inspect(model, output=output, batch=2)
    assert {each.tensor for each in found} == {"m", "step", "n", "shared"}
    for each in found:
        bundle = cut(model, at=each.tensor, output=output, loss="mse")
        assert bundle.server is not None
        counts = [count_trained(party) for party in (bundle.client, bundle.server)]
        assert [each.client_parameters, each.server_parameters] == counts
        assert (each.bytes_down == 0) == (each.tensor in {"m", "step"})


def build_own_loss() -> onnx.ModelProto:
    """Two layers and the loss, which reads the labels as an input of the model."""
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w1", 4, 6), out="h")
    scores = net.op("MatMul", hidden, net.weight("w2", 6, 3), out="scores")
    net.op("SoftmaxCrossEntropyLoss", scores, "target", out="own")
    model = net.finish({"x": (FLOAT, ["N", 4]), "target": (INT64, ["N"])}, scores, 3)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("own", FLOAT, []))
    return model


def test_inputs_that_would_give_a_model_cuts_are_advised() -> None:
    model = build_own_loss()
    assert inspect(model) == []
    assert advise_sent(model) == [("target",)]
    cuts = inspect(model, sent=["target"])
    assert [(each.tensor, each.raw) for each in cuts][:1] == [("h", ("target",))]
    assert advise_sent(load_model("34_passed_through")) != []


def test_a_cut_names_the_raw_inputs_that_cut_asks_to_permit() -> None:
    net = Net()
    scaled = net.op("Transpose", "x", out="turned", perm=[0, 2, 1])
    hidden = net.op("MatMul", scaled, net.weight("w1", 4, 6), out="h")
    net.op("MatMul", hidden, net.weight("w2", 6, 3), out="y")
    model = net.finish({"x": (FLOAT, ["N", 4, 5])}, "y", 5, 3)
    raw = {each.tensor: each.raw for each in inspect(model)}
    assert raw == {"turned": ("x",), "h": ()}
    options = {"send_labels": True, "check": False, "loss": "mse"}
    for tensor, names in raw.items():
        assert permissions.cut(model, at=tensor, send_inputs=names, **options).server  # type: ignore[arg-type]
    with pytest.raises(InputsNotPermitted):
        permissions.cut(model, at="turned", **options)  # type: ignore[arg-type]


def test_sizes_that_only_inference_names_are_not_known() -> None:
    net = Net()
    net.op("Conv", "x", net.weight("w", 4, 3, 3, 3), out="c", kernel_shape=[3, 3], strides=[2, 2])
    net.op("GlobalAveragePool", net.op("Tanh", "c", out="bent"), out="mean")
    net.op("Flatten", "mean", out="flat")
    net.op("MatMul", "flat", net.weight("last", 4, 2), out="y")
    model = net.finish({"x": (FLOAT, ["N", 3, "H", "W"])}, "y", 2)
    shapes = {each.tensor: each.shape for each in inspect(model)}
    assert shapes["bent"] == ("N", 4, None, None)
    assert shapes["flat"] == ("N", 4)
    pairs = inspect_pairs(model)
    ends = {shape for pair in pairs for shape in (*pair.at_shapes, *pair.tail_shapes)}
    assert ("N", 4, None, None) in ends
    assert not [dim for shape in ends for dim in shape if isinstance(dim, str) and dim != "N"]


def test_bytes_are_those_that_a_codec_sends() -> None:
    model = ZOO["convolutions"].build()
    plain = {c.tensor: c for c in inspect(model, batch=32)}
    coded = {c.tensor: c for c in inspect(model, batch=32, wire="fwd=int8,bwd=bf16")}
    assert plain["r1"].bytes_up == plain["r1"].bytes_down == 4 * 32 * 100
    assert (coded["r1"].bytes_up, coded["r1"].bytes_down) == (32 * 100 + 4 * 4, 2 * 32 * 100)
    small = {c.tensor: c for c in inspect(ZOO["chain"].build(), batch=32, wire="bwd=int4")}
    assert (small["act1"].bytes_up, small["act1"].bytes_down) == (4 * 32 * 7, None)
