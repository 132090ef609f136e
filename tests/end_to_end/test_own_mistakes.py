"""Mistakes planted in this package: each is owned up to, and none becomes advice on the model."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import InternalModelError, InternalRuntimeError, RemoteFault, SplitonnxError
from splitonnx.faults import LOGGER
from splitonnx.partitioner import (
    loss_files,
    lowerings,
    merges,
    model_losses,
    partitions,
    permissions,
    rewrites,
)
from splitonnx.partitioner.cutting import cuts, joints, ports, preparations, safeguards, stages
from splitonnx.partitioner.cutting.candidates import bisections
from splitonnx.partitioner.cutting.conformance import samples
from splitonnx.partitioner.cutting.conformance.expectations import expect
from splitonnx.partitioner.cutting.passes import batches
from splitonnx.partitioner.differentiation import loss_arrays, losses, updates
from splitonnx.partitioner.differentiation.control_flow import obstacles
from splitonnx.partitioner.differentiation.derived import derivations
from splitonnx.partitioner.gate import forms, gates, names
from splitonnx.partitioner.inference import evaluations, folds, shapes
from splitonnx.partitioner.lowerings import pools
from splitonnx.partitioner.lowerings.kernels import choices, relu_gradients
from splitonnx.partitioner.native import corrections, natives, workers
from splitonnx.partitioner.native.workers import Isolation, call
from splitonnx.partitioner.normalization import (
    explicit_padding,
    opsets,
    parameters,
    quantizations,
    weights,
)
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports import (
    checks,
    diagnoses,
    formulas,
    layers,
    loss_readings,
    running_statistics,
    suspects,
    ties,
)
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.rewrites import activations
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.server.servers import Server
from tests.support.forked_natives import forking_natives
from tests.support.zoo import FLOAT, ZOO, Net


def build() -> onnx.ModelProto:
    """Build a network with what is rewritten (Elu), lowered (Relu, pools), normalized (Conv)."""
    net = Net()
    h = net.op("Conv", "x", net.weight("w1", 3, 2, 2, 2), out="h", auto_pad="SAME_UPPER")
    for kind in ("MaxPool", "AveragePool"):
        h = net.op(kind, h, out=kind, kernel_shape=[1, 1])
    h = net.op("Elu", h, out="elu")
    h = net.op("Relu", h, out="relu")
    h = net.op("Flatten", h, out="flat")
    net.op("MatMul", h, net.weight("w2", 48, 2), out="y")
    return net.finish({"x": (FLOAT, ("N", 2, 4, 4))}, "y", 2)


def fail(first: Any, *others: Any) -> Any:
    """Do what a mistake of ours does, in the place of a rule that takes a node last."""
    return (first, *others)[-1].no_such_attribute


PLACES = {
    "a rewrite": (rewrites, "REWRITES", "Elu", "node 'elu_node' (Elu)", "rewritten"),
    "a lowering": (lowerings, "LOWERINGS", "MaxPoolGrad", "(MaxPoolGrad)", "lowered"),
    "a choice of kernels": (
        choices, "_CHOICES", "ReluGrad", "(ReluGrad)", "given a faster kernel",
    ),
    "a normalization pass": (
        explicit_padding, "_make_padding_explicit", None, "node 'h_node' (Conv)",
        "given explicit padding",
    ),
    "a pass without nodes": (
        opsets, "_choose_target", None, "the model", "brought to opset 18 to 21",
    ),
    "the gradients' reading": (
        derivations, "_read_derived", None, "the model", "read from the gradient builder",
    ),
    "a pass around the gradients": (derivations, "_annotate", None, "the model", "differentiated"),
    "a pass after them": (joints, "_match_gradients", None, "the model", "differentiated"),
    "the gate's own reader": (gates, "read_model", None, "the model", "checked by the gate"),
    "the reading of types": (
        shapes, "_note_entries", None, "the model", "given the types that onnx infers",
    ),
}  # fmt: skip


@pytest.fixture(params=PLACES)
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Plant a mistake; tell where it shows."""
    module, name, key, where, work = PLACES[request.param]
    if key is not None:
        monkeypatch.setitem(getattr(module, name), key, fail)
    elif name in ("read_model", "_note_entries", "_match_gradients", "_choose_target"):
        monkeypatch.setattr(module, name, None)  # TypeError: it cannot be called
    else:
        monkeypatch.setattr(module, name, fail)
    return where, work


def check_owned(error: SplitonnxError, log: pytest.LogCaptureFixture, *parts: str) -> None:
    sentence = str(error)
    for part in ("a mistake in splitonnx", "please report it", *parts):
        assert part in sentence
    assert "export" not in sentence
    assert sentence.isprintable()
    (record,) = [record for record in log.records if record.name == LOGGER]
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert "Traceback" in log.text


def test_a_mistake_in_the_partitioner_names_the_pass_and_the_node(
    planted: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InternalModelError) as caught:
        cut(build(), at="relu", server_target="portable", client_target="portable")
    check_owned(caught.value, caplog, *planted)


def test_a_check_of_a_model_owns_up_too(
    planted: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InternalModelError) as caught:
        check(build())
    check_owned(caught.value, caplog, *planted)


def test_a_pass_that_names_no_node_itself_is_told_of_the_one_that_it_was_at(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def find_shape(node: ir.Node) -> None:
        fail(node)

    monkeypatch.setattr(derivations, "_find_shape", find_shape)
    with pytest.raises(InternalModelError) as caught:
        cut(ZOO["batchnorm_trained"].build(), at=None)
    check_owned(
        caught.value, caplog, "the model at node '", "(BatchNormInternal)", "differentiated"
    )


def test_a_mistake_beside_native_code_comes_back_as_one(caplog: pytest.LogCaptureFixture) -> None:
    wrong: Any = call
    with pytest.raises(InternalModelError) as caught:
        wrong(natives.build_gradients, "the model", b"", 5, "loss")
    check_owned(caught.value, caplog, "the model", "gradient builder", "TypeError")
    assert "natives.py" in caplog.text  # where it failed over there


# --- mistakes that look like a model's fault ----------------------------------------------------

KINDS = (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError)
GATE = ("the model", "checked by the gate")
REPORTED = ("the model", "searched for what training would do unmeant")
TRAINED = ("the model", "differentiated")
WRITTEN = ("the model", "written as a bundle")

IN_A_CUT: Sequence[tuple[Callable[..., object], str, str]] = [
    (names.check_texts, *GATE),
    (forms.check_form, *GATE),
    (names.check_types, *GATE),
    (parameters.find_input_scalings, "the model", "given the roles of its weights"),
    (opsets._choose_target, "the model", "brought to opset 18 to 21"),
    (explicit_padding._find_pads, "node 'h_node' (Conv)", "given explicit padding"),
    (evaluations._infer_types, "node '", "asked for its shapes"),
    (folds._replace_by_constants, "node 'h_node' (Conv)", "folded"),
    (weights.assign_roles, "the model", "given the roles of its weights"),
    (activations.rewrite_elu, "node 'elu_node' (Elu)", "rewritten"),
    (preparations.choose_output, "the model", "searched for the output of the loss"),
    (loss_arrays.find_class_axis, "the model", "searched for what to warn of"),
    (cuts.divide, *TRAINED),
    (losses.attach_losses, *TRAINED),
    (ports.insert_ports, *TRAINED),
    (safeguards._check_rows, "node 'h_node' (Conv)", "guarded against data that crash its kernel"),
    (derivations._name_permutations, *TRAINED),
    (relu_gradients.multiply_by_slope, "(ReluGrad)", "given a faster kernel"),
    (pools.lower_max_pool_grad, "(MaxPoolGrad)", "lowered"),
    (pools.lower_average_pool_grad, "(AveragePoolGrad)", "lowered"),
    (partitions.refuse_untrainable, "the model", "tried in training"),
    (joints._list_gradients, *TRAINED),
    (joints._declare_data, *TRAINED),
    (permissions.find_raw_inputs, "the model", "searched for what leaves the client"),
    (stages.cut_stages, *WRITTEN),
    (updates.build_update, *WRITTEN),
    (samples.iter_draws, "the model", "compared with the model given"),
    (loss_files.read_loss_files, "the model", "given the losses from files"),
    (model_losses.separate_losses, "the model", "separated from its loss"),
    (merges.collect_weights, "the model", "given its weights again"),
    (quantizations.fold_quantized, "the model", "merged"),
]
IN_A_CHECK: Sequence[tuple[Callable[..., object], str, str]] = [
    (diagnoses._miss_batchnorms, "the model", "searched for what is missing from its training"),
    (loss_arrays.fit_loss, "the model", "tried with the losses"),
    (obstacles.list_undifferentiable, "the model", "tried in training"),
    (suspects.find_computed, *REPORTED),
    (formulas.describe_formula, *REPORTED),
    (loss_readings.remark_on_losses, *REPORTED),
    (ties.remark_on_ties, *REPORTED),
    (running_statistics.remark_on_statistics, *REPORTED),
    (batches.find_fixing_node, *REPORTED),
    (bisections.find_bisections, "the model", "searched for cuts"),
    (checks._list_uses, "the model", "searched for its operators"),
    (layers._find_user, "the model", "searched for its layers"),
]


def plant(patch: pytest.MonkeyPatch, function: Any, kind: type[Exception]) -> None:
    """Let a function raise an error in its own module, whoever has imported it."""
    function = inspect.unwrap(function)
    scope: dict[str, Any] = {}
    exec(f"def fail(*_, **__): raise {kind.__name__}('planted')", scope)
    patch.setattr(function, "__code__", scope["fail"].__code__)


def list_plants(
    places: Sequence[tuple[Callable[..., object], str, str]],
) -> list[tuple[Callable[..., object], str, str, type[Exception]]]:
    """Choose two kinds of errors for each place, so that all kinds occur."""
    return [
        (*place, KINDS[(index + shift) % len(KINDS)])
        for index, place in enumerate(places)
        for shift in (0, 2)
    ]


@pytest.mark.parametrize(("function", "where", "work", "kind"), list_plants(IN_A_CUT))
def test_a_cut_owns_up_to_any_kind_of_error(
    function: Callable[..., object],
    where: str,
    work: str,
    kind: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plant(monkeypatch, function, kind)
    with pytest.raises(InternalModelError) as caught:
        permissions.cut(
            build(), at="relu", loss="mse", send_labels=True, client_target="portable",
            server_target="portable", check=True,
        )  # fmt: skip
    check_owned(caught.value, caplog, where, work, f"{kind.__name__}: ", "planted")


@pytest.mark.parametrize(("function", "where", "work", "kind"), list_plants(IN_A_CHECK))
def test_a_check_owns_up_to_any_kind_of_error(
    function: Callable[..., object],
    where: str,
    work: str,
    kind: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plant(monkeypatch, function, kind)
    with pytest.raises(InternalModelError) as caught:
        check(build())
    check_owned(caught.value, caplog, where, work, f"{kind.__name__}: ", "planted")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_in_an_operator_given_to_the_reference_evaluator_is_not_its_own(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant(monkeypatch, corrections.Softmax._run, kind)
    model = ZOO["attention"].build()
    isolation = Isolation()
    monkeypatch.setattr(workers, "call", isolation.call)
    try:
        with forking_natives(), pytest.raises(InternalModelError) as caught:
            expect(model, "the model", 0)
    finally:
        isolation.end()
    work = "evaluated with operators of our own"
    check_owned(caught.value, caplog, work, f"{kind.__name__}: ", "corrections")


# --- the command line -------------------------------------------------------------------------

PLANTING = """
from splitonnx.commands import UNUSED, main
from splitonnx.imports import postpone
postpone(*UNUSED)  # before main does, for it would be too late then
from splitonnx.partitioner import rewrites
rewrites.REWRITES["Elu"] = lambda builder, node: node.no_such_attribute
main()
"""
TRACED = {"SPLITONNX_TRACEBACK": "1"}


WORDS = [
    ["check"],
    ["cut", "--at", "relu", "-o", "bundle"],
    ["train", "--local", "--loss", "mse", "--data", "data.npz"],
]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("is_traced", [False, True])
def test_the_command_line_owns_up_in_one_line(
    words: list[str], is_traced: bool, tmp_path: Path
) -> None:
    onnx.save(build(), tmp_path / "model.onnx")
    x, labels = np.zeros((4, 2, 4, 4), np.float32), np.zeros((4, 2), np.float32)
    np.savez(tmp_path / "data.npz", x=x, labels=labels)
    name, *options = words
    done = subprocess.run(
        [sys.executable, "-c", PLANTING, name, "model.onnx", *options],
        cwd=tmp_path,
        env={"PYTHONPATH": os.pathsep.join(sys.path)} | (TRACED if is_traced else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    *trace, line = done.stderr.splitlines()
    assert line.startswith("splitonnx: a mistake in splitonnx, not in the model: node 'elu_node'")
    assert "while it was rewritten (AttributeError: " in line
    assert "export" not in line
    assert bool(trace) is is_traced
    assert any("no_such_attribute" in row for row in trace) is is_traced
    assert not (tmp_path / "bundle").exists()


# --- stages, at the client and at the server --------------------------------------------------


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", loss="cross-entropy")


def serve(bundle: Bundle) -> Server:
    assert bundle.server is not None
    return Server(bundle.server, port=0)


def plant_stage(patch: pytest.MonkeyPatch, name: str) -> None:
    """Plant a mistake of ours in the engine, for one stage."""
    run = Engine.run

    def run_wrongly(engine: Engine, stage: Any, feeds: Any) -> Any:
        return fail(stage) if stage.name == name else run(engine, stage, feeds)

    patch.setattr(Engine, "run", run_wrongly)


def test_a_mistake_in_a_stage_of_the_client_names_the_stage(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant_stage(monkeypatch, "head.forward")
    with (
        serve(bundle) as server,
        Client(bundle.client, server.url) as client,
        pytest.raises(InternalRuntimeError) as caught,
    ):
        client.step(ZOO["chain"].data(4))
    check_owned(caught.value, caplog, "stage 'head.forward'", "AttributeError")


def test_a_mistake_in_a_stage_of_the_server_reaches_both_sides(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant_stage(monkeypatch, "body.step")
    with (
        serve(bundle) as server,
        Client(bundle.client, server.url) as client,
        pytest.raises(RemoteFault) as caught,
    ):
        client.step(ZOO["chain"].data(4))
    assert caught.value.code == "InternalRuntimeError"
    check_owned(caught.value, caplog, "stage 'body.step'", "at the server", "the server's log")
    assert "no_such_attribute" not in str(caught.value)  # what it says may be the server's alone
    assert "no_such_attribute" in caplog.text
