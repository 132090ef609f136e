"""The verb cut: what it takes, what it chooses by itself, and what it refuses."""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from splitonnx.bundles import Bundle
from splitonnx.errors import NotAModel, UnknownTensor, UsageError
from splitonnx.names import Target
from splitonnx.optimizers import (
    SGD,
    AdamW,
    ParameterGroup,
    describe_optimizer,
    read_optimizer,
)
from splitonnx.partitioner.cutting.preparations import choose_output, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut, cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.verifications import verify
from tests.support.zoo import FLOAT, INT64, ZOO, Net


def build_two_outputs() -> onnx.ModelProto:
    """Integers first, then scores."""
    net = Net()
    scores = net.op("MatMul", "x", net.weight("w", 6, 3), out="scores")
    net.op("ArgMax", scores, out="place", axis=1, keepdims=0)
    model = net.finish({"x": (FLOAT, ["N", 6])}, "scores", 3)
    scores_info = model.graph.output.pop()
    model.graph.output.append(helper.make_tensor_value_info("place", INT64, ["N"]))
    model.graph.output.append(scores_info)
    onnx.checker.check_model(model)
    return model


def test_a_path_bytes_and_a_model_give_the_same_bundle(tmp_path: Path) -> None:
    model = ZOO["chain"].build()
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    sources = [model, model.SerializeToString(), path, str(path), ir.from_proto(model)]
    digests = {cut(source, at="act1").manifest.digest for source in sources}
    assert len(digests) == 1


def build_with_a_weight_that_no_part_uses() -> onnx.ModelProto:
    """Add an output to a small network that depends on a weight alone."""
    net = Net()
    felt = net.op("Relu", net.op("MatMul", "x", net.weight("w", 6, 4), out="made"), out="felt")
    net.op("MatMul", felt, net.weight("v", 4, 3), out="scores")
    net.op("MatMul", net.weight("lost", 2, 6), net.weight("gone", 6, 2), out="still")
    model = net.finish({"x": (FLOAT, ["N", 6])}, "scores", 3)
    model.graph.output.append(helper.make_tensor_value_info("still", FLOAT, [2, 2]))
    return model


@pytest.mark.parametrize("name", ["unused", "attention", "dropout", "shape_paths"])
def test_a_model_prepared_once_gives_every_cut_as_one_prepared_for_it(name: str) -> None:
    model = build_with_a_weight_that_no_part_uses() if name == "unused" else ZOO[name].build()
    prepared = prepare(open_model(model))
    first, *_, last = (found.tensor for found in list_cuts(prepared, None))
    targets: list[Target] = ["training", "portable", "training"]
    places: list[tuple[str | None, str]] = [(first, ""), (first, last), (None, "")]
    for target, (at, tail) in zip(targets, places, strict=True):
        tail_at = [tail] if tail else ()
        options: dict[str, Any] = {"client_target": target, "server_target": target}
        made = cut_prepared(prepared, at=at, tail_at=tail_at, loss="mse", **options)
        alone = cut(model, at=at, tail_at=tail_at, loss="mse", **options)
        assert made.manifest == alone.manifest
        assert made.skeleton == alone.skeleton
        for party, part in alone.parties.items():
            assert made.parties[party].manifest == part.manifest
            assert made.parties[party].graphs == part.graphs
    if name == "unused":
        stored = onnx.load_from_string(made.skeleton).graph.initializer
        assert {tensor.name for tensor in stored} >= {"lost", "gone"}
        assert not prepared.skeleton.graph.initializers.keys() & {"lost", "gone"}


def test_one_name_is_as_good_as_a_list_of_one() -> None:
    model = ZOO["chain"].build()
    one, many = cut(model, at="act0", tail_at="act1"), cut(model, at=["act0"], tail_at=["act1"])
    assert one.manifest == many.manifest
    assert one.manifest.recipe.at == ("act0",)


def test_the_recipe_says_how_the_bundle_was_cut() -> None:
    optimizer = SGD(lr=0.5, momentum=0.9)
    bundle = cut(
        ZOO["chain"].build(), at="act1", optimizer=optimizer, freeze=["^b0$"],
        dropout="off", client_target="portable",
    )  # fmt: skip
    recipe = bundle.manifest.recipe
    assert recipe.optimizer == describe_optimizer(optimizer)
    assert (recipe.freeze, recipe.dropout, recipe.batchnorm) == (("^b0$",), "off", None)
    assert (recipe.client_target, recipe.server_target) == ("portable", "training")
    assert bundle.client.manifest.target == "portable"
    default = cut(ZOO["chain"].build(), at="act1").manifest.recipe
    assert default.optimizer == describe_optimizer(AdamW(lr=1e-3))
    assert default.loss == "cross-entropy"


def test_a_split_model_trains_as_the_whole() -> None:
    entry = ZOO["residual"]
    bundle = cut(entry.build(), at="r1", tail_at="sum", server_target="portable")
    found = verify(bundle, entry.data(12), steps=2, batch_size=6)
    assert found.largest_difference <= 1e-6


def test_parameter_groups_have_rates_of_their_own_on_both_sides(tmp_path: Path) -> None:
    """One step of SGD moves a parameter by its gradient, times the group's rate."""
    entry = ZOO["residual"]
    data = dict(entry.data(8))

    def take_step(bundle: Bundle) -> dict[str, np.ndarray]:
        assert bundle.server is not None
        link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
        with Client(bundle.client, link, threads=1) as client:
            client.step(data)
            link.drain()
            after = {**client.state(), **link.executor.state()}
        before = {**bundle.client.state(), **bundle.server.state()}
        return {name: after[name].astype(np.float64) - before[name] for name in before}

    def cut_with(groups: Sequence[ParameterGroup]) -> Bundle:
        return cut(entry.build(), at="r1", tail_at="sum", optimizer=SGD(lr=0.5, groups=groups))

    plain = take_step(cut_with([]))
    groups = (
        ParameterGroup(pattern=".", lr_factor=0.5),
        ParameterGroup(pattern=f"^{re.escape(list(plain)[-1])}$", lr_factor=0.25),
    )
    bundle = cut_with(groups)
    bundle.save(tmp_path / "bundle")
    loaded = Bundle.load(tmp_path / "bundle")
    assert read_optimizer(loaded.manifest.recipe.optimizer) == SGD(lr=0.5, groups=groups)
    for name, change in take_step(loaded).items():
        factor = 0.25 if name == list(plain)[-1] else 0.5
        np.testing.assert_allclose(change, factor * plain[name], rtol=1e-4, atol=1e-7)
        assert np.any(change)
    assert verify(loaded, data, steps=2, batch_size=4).largest_difference <= 1e-6


def test_a_group_that_finds_no_trained_parameter_is_refused() -> None:
    optimizer = SGD(groups=(ParameterGroup(pattern="^b0$"),))
    assert cut(ZOO["chain"].build(), at="act1", optimizer=optimizer)
    with pytest.raises(UsageError, match=r"--param-group \^b0\$: it finds no parameter that is"):
        cut(ZOO["chain"].build(), at="act1", optimizer=optimizer, freeze=["^b0$"])


def test_the_loss_is_taken_of_the_first_float_output_unless_one_is_named() -> None:
    prepared = prepare(open_model(build_two_outputs()))
    assert choose_output(prepared, None) == "scores"
    assert choose_output(prepared, "scores") == "scores"
    assert choose_output(prepared, "place") == "place"
    assert cut(build_two_outputs(), at=None).manifest.recipe.output == "scores"


def test_an_output_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match="no output 'logits'; it has place, scores"):
        cut(build_two_outputs(), at=None, output="logits")


def test_a_model_whose_outputs_no_input_reaches_is_refused() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 6, 3), out="unused")
    net.op("Identity", net.weight("v", 3), out="y")
    graph = helper.make_graph(
        net.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])], net.weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with pytest.raises(UsageError, match="no output that depends on its inputs"):
        cut(model, at=None)


@pytest.mark.parametrize("party", ["client_target", "server_target"])
def test_an_unknown_target_is_refused(party: str) -> None:
    with pytest.raises(UsageError, match="no target 'phone'"):
        cut(ZOO["chain"].build(), at="act1", **{party: "phone"})  # type: ignore[arg-type]


def test_errors_of_the_parts_come_through() -> None:
    with pytest.raises(NotAModel):
        cut(b"no model", at="act1")
    with pytest.raises(UnknownTensor, match="'akt1'"):
        cut(ZOO["chain"].build(), at="akt1")
    with pytest.raises(UsageError, match="--at"):
        cut(ZOO["chain"].build(), at=None, tail_at="act1")


def test_the_garbage_collector_is_on_again_behind_a_cut_and_an_error() -> None:
    assert gc.isenabled()
    cut(ZOO["chain"].build(), at="act1")
    with pytest.raises(UnknownTensor):
        cut(ZOO["chain"].build(), at="akt1")
    assert gc.isenabled()
