"""The list of pairs for a U-shape: what each sends, what each trains, and which are recommended."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
from onnx import ModelProto

from splitonnx.errors import CutError, LabelsNotPermitted, UnknownTensor, UsageError
from splitonnx.partitioner import permissions
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.u_shapes.pairs import PairCandidate, inspect_pairs
from tests.support.carried import AVERAGES, RECURRENT, build_averages, build_recurrent
from tests.support.zoo import FLOAT, INT64, ZOO, Net


def build_masked(length: int | str = "T") -> ModelProto:
    """Two layers that a mask multiplies, and one after them."""
    net = Net()
    first = net.op("MatMul", "x", net.weight("w1", 6, 5), out="h1")
    second = net.op("MatMul", net.op("Mul", first, "mask", out="m1"), net.weight("w2", 5, 5),
                    out="h2")  # fmt: skip
    third = net.op("Tanh", net.op("Mul", second, "mask", out="m2"), out="t2")
    net.op("MatMul", third, net.weight("w3", 5, 3), out="y")
    inputs = {"x": (FLOAT, ["N", length, 6]), "mask": (FLOAT, ["N", length, 1])}
    return net.finish(inputs, "y", length, 3)


def find(pairs: list[PairCandidate], at: str, tail_at: str) -> PairCandidate:
    return next(p for p in pairs if p.at[0] == at and p.tail_at[0] == tail_at)


def test_a_pair_counts_what_a_sample_sends_and_who_has_which_weights() -> None:
    pair = find(inspect_pairs(ZOO["chain"].build()), "act0", "act3")
    assert (pair.at_shapes, pair.tail_shapes) == ((("N", 8),), (("N", 6),))
    assert pair.bytes_up == pair.bytes_down == 4 * (8 + 6)
    sizes = [math.prod(t.dims) for t in ZOO["chain"].build().graph.initializer]
    assert pair.head_parameters == sum(sizes[:2])
    assert pair.tail_parameters == sum(sizes[-2:])
    assert pair.server_parameters == sum(sizes[2:-2])
    assert pair.client_share == pytest.approx(1 - pair.server_parameters / sum(sizes))


def test_pairs_are_in_the_order_of_the_graph() -> None:
    pairs = inspect_pairs(ZOO["chain"].build())
    names = [output for node in ZOO["chain"].build().graph.node for output in node.output]
    places = [(names.index(pair.at[0]), names.index(pair.tail_at[0])) for pair in pairs]
    assert places == sorted(places)
    assert len(places) == len(names) * (len(names) - 1) / 2


def test_no_gradient_returns_where_nothing_before_the_tensor_is_trained() -> None:
    net = Net()
    net.op("Tanh", "x", out="bent")
    net.op("Relu", net.op("MatMul", "bent", net.weight("w", 6, 5), out="product"), out="r")
    net.op("MatMul", "r", net.weight("w2", 5, 2), out="y")
    model = net.finish({"x": (FLOAT, ["N", 6])}, "y", 2)
    pair = find(inspect_pairs(model), "bent", "r")
    assert (pair.bytes_up, pair.bytes_down) == (4 * (6 + 5), 4 * 5)


def test_a_skip_from_head_to_tail_stays_at_the_client() -> None:
    pairs = inspect_pairs(ZOO["residual"].build())
    assert find(pairs, "r1", "m3").server_parameters == 128  # 'sum' adds what the client kept


def test_an_end_that_is_named_is_the_only_one() -> None:
    model = ZOO["chain"].build()
    pairs = inspect_pairs(model)
    assert [p.tail_at for p in inspect_pairs(model, at="act1")] == [
        p.tail_at for p in pairs if p.at == ("act1",)
    ]
    assert [p.at for p in inspect_pairs(model, tail_at=["act3"])] == [
        p.at for p in pairs if p.tail_at == ("act3",)
    ]
    (pair,) = inspect_pairs(model, at=["act1"], tail_at=["act3"])
    assert pair.bytes_up == find(pairs, "act1", "act3").bytes_up


def test_several_tensors_that_are_named_go_together() -> None:
    model = ZOO["two_streams"].build()
    pairs = inspect_pairs(model, at=["s1", "s2"])
    assert {pair.at for pair in pairs} == {("s1", "s2")}
    for pair in pairs:
        assert cut(model, at=pair.at, tail_at=pair.tail_at).server is not None


def test_a_mask_hides_pairs_until_it_may_be_sent() -> None:
    model = build_masked(7)
    alone = {(pair.at, pair.tail_at) for pair in inspect_pairs(model)}
    assert not any(tail_at == ("t2",) for at, tail_at in alone if at == ("h1",))
    beside = inspect_pairs(model, sent=["mask"])
    pair = find(beside, "h1", "t2")
    assert pair.at == ("h1", "mask")
    assert (pair.bytes_up, pair.bytes_down) == (4 * 7 * (5 + 1 + 5), 4 * 7 * (5 + 5))
    assert {(p.at, p.tail_at) for p in beside} > alone
    assert find(beside, "m1", "h2").at == ("m1",)  # no mask is read in between


def test_what_is_listed_beside_a_mask_is_what_cut_takes() -> None:
    model = build_masked()
    listed = {(p.at, p.tail_at) for p in inspect_pairs(model, sent=["mask"])}
    names = [output for node in model.graph.node for output in node.output]
    for at in ((name, *sent) for name in names for sent in ((), ("mask",))):
        for tail_at in names:
            try:
                cut(model, at=at, tail_at=tail_at, loss="mse", check=False)
            except CutError:
                assert (at, (tail_at,)) not in listed
            else:
                assert (at, (tail_at,)) in listed


def test_a_size_that_is_given_makes_bytes_known() -> None:
    unknown = inspect_pairs(build_masked(), sent=["mask"])
    assert {pair.bytes_up for pair in unknown} == {None}
    assert not any(pair.recommended for pair in unknown)
    known = inspect_pairs(build_masked(), sent=["mask"], dims={"T": 128})
    assert find(known, "h1", "t2").bytes_up == 4 * 128 * (5 + 1 + 5)
    assert any(pair.recommended for pair in known)


def test_a_fixed_batch_is_divided_by() -> None:
    net = Net()
    net.op("Relu", net.op("MatMul", "x", net.weight("w", 6, 5), out="h"), out="r")
    net.op("MatMul", "r", net.weight("w2", 5, 2), out="y")
    model = net.finish({"x": (FLOAT, [4, 6])}, "y", 2)
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 4
    pair = find(inspect_pairs(model), "h", "r")
    assert pair.at_shapes == ((4, 5),)
    assert pair.bytes_up == 4 * (5 + 5)


def test_an_integer_behind_trained_parameters_is_neither_end() -> None:
    net = Net()
    net.op("ArgMax", net.op("MatMul", "x", net.weight("w", 6, 5), out="h"), out="places", axis=1)
    net.op("Gather", net.weight("table", 5, 3), "places", out="rows")
    net.op("Squeeze", "rows", net.constant("axis", np.array([1])), out="y")
    model = net.finish({"x": (FLOAT, ["N", 6])}, "y", 3)
    assert not any("places" in (*p.at, *p.tail_at) for p in inspect_pairs(model))
    ids = Net()
    ids.op("Add", "ids", ids.constant("one", np.array(1)), out="next")
    ids.op("Gather", ids.weight("table", 9, 3), "next", out="rows")
    ids.op("MatMul", "rows", ids.weight("w", 3, 3), out="y")
    model = ids.finish({"ids": (INT64, ["N"])}, "y", 3)
    assert find(inspect_pairs(model), "next", "rows").bytes_up == 8 + 4 * 3


def test_names_that_cannot_be_meant_are_refused() -> None:
    model = ZOO["chain"].build()
    with pytest.raises(UnknownTensor, match="'nowhere'"):
        inspect_pairs(model, at="nowhere")
    with pytest.raises(UsageError, match="'act1' is not an input"):
        inspect_pairs(model, sent=["act1"])
    with pytest.raises(UsageError, match="no output 'other'"):
        inspect_pairs(model, output="other")


def test_parameters_without_a_gradient_are_not_counted() -> None:
    net = Net()
    step = net.op("Floor", net.op("MatMul", "x", net.weight("w1", 6, 8), out="m"), out="step")
    hidden = net.op("Tanh", net.op("MatMul", step, net.weight("w2", 8, 4), out="n"), out="h")
    net.op("MatMul", hidden, net.weight("w3", 4, 3), out="y")
    pair = find(inspect_pairs(net.finish({"x": (FLOAT, ["N", 6])}, "y", 3)), "m", "h")
    assert (pair.head_parameters, pair.server_parameters, pair.tail_parameters) == (0, 32, 12)


@pytest.mark.parametrize("name", ["chain", "batchnorm_trained", "pools", "shape_paths"])
def test_pairs_that_tell_the_labels_are_those_that_cut_asks_to_permit(name: str) -> None:
    model = ZOO[name].build()
    last = {pair.tail_at: pair for pair in inspect_pairs(model)}
    assert any(pair.tells_labels for pair in last.values())
    for tail_at, pair in last.items():
        if pair.tells_labels:
            with pytest.raises(LabelsNotPermitted):
                permissions.cut(model, at=pair.at, tail_at=tail_at, check=False)
        else:
            assert permissions.cut(model, at=pair.at, tail_at=tail_at, check=False).server


@pytest.mark.parametrize(
    ("model", "states", "dims"),
    [
        (build_recurrent(), RECURRENT, {"x:0": 4, "h_in:0": 4}),
        (build_averages(), AVERAGES, {}),
    ],
    ids=["recurrent", "averages"],
)
def test_with_states_the_pairs_are_those_that_cut_accepts(
    model: ModelProto, states: Mapping[str, str], dims: Mapping[str, int]
) -> None:
    pairs = inspect_pairs(model, states=states, dims=dims)
    found = {(pair.at, pair.tail_at) for pair in pairs}
    assert found
    names = [node.output[0] for node in model.graph.node]
    for at, tail_at in itertools.permutations(names, 2):
        try:
            bundle = cut(
                model, at=at, tail_at=tail_at, loss="mse", states=states, dims=dims, check=False
            )
        except (CutError, UsageError):
            assert ((at,), (tail_at,)) not in found
            continue
        recipe = bundle.manifest.recipe
        assert (recipe.at, recipe.tail_at) in found
