"""Every cut is compared with the model given; planted faults of the partitioner are caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from splitonnx.bundles import Bundle
from splitonnx.errors import DifferentResult, NativeCrash, UsageError
from splitonnx.partitioner.cutting.assemblies import assemble
from splitonnx.partitioner.cutting.conformance.dataflow import (
    BrokeDown,
    run_merged,
    run_split,
)
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.adjustments import Adjustments
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import NO_CHECK, cut
from tests.support.nets import FLOAT, INT64, Arrays, Net

Plant = Callable[[ir.Graph], None]

PARTITIONS = "splitonnx.partitioner.partitions"
EXPECTATIONS = "splitonnx.partitioner.cutting.conformance.expectations"
COMPARISONS = "splitonnx.partitioner.cutting.conformance.comparisons"


def build_model() -> onnx.ModelProto:
    """Build a model in which each of the faults below makes a difference."""
    net = Net()
    first = net.op("MatMul", "x", net.weight("w0", 6, 6), out="first")
    active = net.op("LeakyRelu", first, out="active", alpha=0.3)
    second = net.op("MatMul", active, net.weight("w1", 6, 6), out="second")
    gap = net.op("Sub", second, net.op("Tanh", second, out="bent"), out="gap")
    shares = net.op("Softmax", gap, out="shares", axis=1)
    return net.finish(
        {"x": (FLOAT, ["N", 6])}, net.op("MatMul", shares, net.weight("w2", 6, 3), out="y"), 3
    )


def find_node(graph: ir.Graph, kind: str) -> ir.Node:
    return next(node for node in graph if node.op_type == kind)


def drop_node(graph: ir.Graph) -> None:
    node = find_node(graph, "LeakyRelu")
    source = node.inputs[0]
    assert source is not None
    ir.convenience.replace_all_uses_with(node.outputs[0], source)


def swap_inputs(graph: ir.Graph) -> None:
    node = find_node(graph, "Sub")
    first, second = node.inputs
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)


def change_attribute(graph: ir.Graph) -> None:
    find_node(graph, "LeakyRelu").attributes["alpha"] = ir.AttrFloat32("alpha", 0.2)


def take_another_weight(graph: ir.Graph) -> None:
    first, second = (
        node
        for node in graph
        if node.op_type == "MatMul" and node.inputs[1] and node.inputs[1].name in ("w0", "w1")
    )
    second.replace_input_with(1, first.inputs[1])


def change_axis(graph: ir.Graph) -> None:
    find_node(graph, "Softmax").attributes["axis"] = ir.AttrInt64("axis", 0)


PLANTS: dict[Plant, str] = {
    drop_node: "second",
    swap_inputs: "gap",
    change_attribute: "active",
    take_another_weight: "second",
    change_axis: "shares",
}
"""Each fault, and the first tensor that is wrong because of it."""
FORMS: dict[str, Callable[[PreparedModel], ir.Model]] = {
    "what the parts predict": lambda prepared: prepared.inference,
    "the merged model": lambda prepared: prepared.skeleton,
    "the model prepared for training": lambda prepared: prepared.training,
}


@pytest.mark.parametrize("made", FORMS)
@pytest.mark.parametrize("plant", PLANTS)
def test_a_fault_planted_in_any_form_is_caught(
    plant: Plant, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare_wrongly(*arguments: ir.Model, **options: object) -> PreparedModel:
        prepared = prepare(*arguments, **options)  # type: ignore[arg-type]
        plant(FORMS[made](prepared).graph)
        return prepared

    monkeypatch.setattr(f"{PARTITIONS}.prepare", prepare_wrongly)
    with pytest.raises(DifferentResult) as caught:
        cut(build_model(), at="second", check=True)
    assert caught.value.made == made
    assert caught.value.tensor == "y"
    if made != "the merged model":  # its tensors have no names to compare
        assert caught.value.first == PLANTS[plant]


@pytest.mark.parametrize("plant", PLANTS)
def test_a_fault_planted_in_every_form_is_caught(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_wrongly(model: onnx.ModelProto, *given: Adjustments) -> ir.Model:
        opened = open_model(model, *given)
        plant(opened.graph)
        return opened

    monkeypatch.setattr(f"{PARTITIONS}.open_model", open_wrongly)
    with pytest.raises(DifferentResult) as caught:
        cut(build_model(), at="second", check=True)
    assert caught.value.first == PLANTS[plant]


def build_rare_model(kind: str) -> onnx.ModelProto:
    """Build a model with a node that changes few inputs."""
    net = Net()
    inputs: dict[str, tuple[int, list[int | str]]] = {"x": (FLOAT, ["N", 6])}
    if kind == "Clip":  # nothing but large numbers
        bounds = [net.constant(n, np.array(b, np.float32)) for n, b in (("low", -4), ("high", 4))]
        rare = net.op("Clip", "x", *bounds, out="rare")
    else:  # nothing but the last row of a table
        table = np.ones((6, 6), np.float32)
        table[5] = -1
        inputs["place"] = (INT64, ["N"])
        row = net.op("Gather", net.constant("table", table), "place", out="row")
        rare = net.op("Mul", "x", net.op(kind, row, out="seen"), out="rare")
    return net.finish(inputs, net.op("MatMul", rare, net.weight("w", 6, 3), out="y"), 3)


@pytest.mark.parametrize("kind", ["Clip", "Relu"])
def test_a_lost_node_that_changes_few_inputs_is_caught(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_wrongly(model: onnx.ModelProto, *given: Adjustments) -> ir.Model:
        opened = open_model(model, *given)
        node = find_node(opened.graph, kind)
        assert node.inputs[0] is not None
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        return opened

    monkeypatch.setattr(f"{PARTITIONS}.open_model", open_wrongly)
    with pytest.raises(DifferentResult):
        cut(build_rare_model(kind), at=None, loss="mse", check=True)


def test_a_fault_planted_in_a_part_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def assemble_wrongly(*arguments: PreparedModel, **options: object) -> Bundle:
        bundle = assemble(*arguments, **options)  # type: ignore[arg-type]
        assert bundle.server is not None
        weights = {name: array * 1.01 for name, array in bundle.server.weights.items()}
        server = replace(bundle.server, weights=weights)
        return replace(bundle, parties={"client": bundle.client, "server": server})

    monkeypatch.setattr(f"{PARTITIONS}.assemble", assemble_wrongly)
    with pytest.raises(DifferentResult) as caught:
        cut(build_model(), at="second", check=True)
    assert (caught.value.made, caught.value.first) == ("what the parts predict", "y")


def test_the_message_owns_up_and_names_the_tensors() -> None:
    error = DifferentResult("m.onnx", "the merged model", "y", "gap", 0.25)
    assert str(error) == (
        "a mistake in splitonnx, not in the model: the merged model differs from m.onnx by 2.5e-01 "
        "of the largest value in 'y', from tensor 'gap' on; please report it with the model; "
        "--no-check (check=False) leaves out this comparison"
    )


def test_a_right_cut_is_made_without_a_remark(caplog: pytest.LogCaptureFixture) -> None:
    cut(build_model(), at="second", check=True)
    assert not caplog.records


def test_nothing_is_compared_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{PARTITIONS}.compare_with_original", lambda *_: pytest.fail("compared"))
    cut(build_model(), at="second", check=False)
    monkeypatch.setenv(NO_CHECK, "1")
    cut(build_model(), at="second")


def test_a_model_that_the_cut_changes_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="check are for a model as it was given"):
        cut(open_model(build_model()), at="second", check=True)


def test_cuts_are_compared_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def note(*given: object) -> list[str]:
        called.append(given)
        return []

    monkeypatch.setattr(f"{PARTITIONS}.compare_with_original", note)
    monkeypatch.delenv(NO_CHECK, raising=False)
    cut(build_model(), at="second")
    assert len(called) == 1


def test_a_model_too_large_is_said_not_to_be_compared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(f"{PARTITIONS}.MOST_BYTES", 100)
    cut(build_model(), at="second", check=True)
    assert "was not compared" in caplog.text


def test_a_model_that_draws_numbers_is_said_not_to_be_compared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build_model()
    node = helper.make_node("RandomNormalLike", ["second"], ["noise"], name="draw")
    model.graph.node.append(node)
    model.graph.output.append(helper.make_tensor_value_info("noise", FLOAT, ["N", 6]))
    cut(model, at="second", check=True)
    assert "node 'draw' draws random numbers" in caplog.text


def test_a_fusion_that_an_export_alone_would_suffer_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_wrong(*given: object, level: str = "all", **named: object) -> list[Arrays]:
        made = run_split(*given, **named)  # type: ignore[arg-type]
        factor = 2.0 if level == "basic" else 1.0
        return [{name: array * factor for name, array in values.items()} for values in made]

    monkeypatch.setattr(f"{COMPARISONS}.run_split", run_wrong)
    cut(build_model(), at="second", check=True)
    with pytest.raises(DifferentResult) as caught:
        cut(build_model(), at="second", client_target="portable", check=True)
    assert caught.value.made == "what exported parts predict"


def test_a_small_difference_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run_slightly_wrong(*given: object, **named: object) -> list[Arrays]:
        made = run_split(*given, **named)  # type: ignore[arg-type]
        return [{name: array * 1.0003 for name, array in values.items()} for values in made]

    monkeypatch.setattr(f"{COMPARISONS}.run_split", run_slightly_wrong)
    cut(build_model(), at="second", check=True)
    assert "what the parts predict differs by 3.0e-04 from the model, in 'y'" in caplog.text


def test_a_difference_that_another_draw_does_not_confirm_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def run_wrong_once(*given: object, **named: object) -> list[Arrays]:
        made = run_split(*given, **named)  # type: ignore[arg-type]
        calls.append(1)
        factor = 2.0 if len(calls) == 1 else 1.0
        return [{name: array * factor for name, array in values.items()} for values in made]

    monkeypatch.setattr(f"{COMPARISONS}.run_split", run_wrong_once)
    cut(build_model(), at="second", check=True)
    assert not caplog.records
    assert len(calls) == 3


def build_quantized(largest: int) -> onnx.ModelProto:
    """Build a Softmax between pairs, which integer kernels round to other steps."""
    net = Net(opset=19)
    scale = net.constant("scale", np.array(0.02, np.float32))
    zero = net.constant("zero", np.array(128, np.uint8))
    net.op("QuantizeLinear", "x", scale, zero, out="q")
    net.op("DequantizeLinear", "q", scale, zero, out="d")
    weights = np.full((6, 6), largest, np.int8)
    weights[:3] = -largest
    of_w = [net.constant("w.scale", np.array(0.01, "f")), net.constant("w.zero", np.array(0, "b"))]
    net.op("DequantizeLinear", net.constant("w", weights), *of_w, out="floats")
    net.op("MatMul", "d", "floats", out="first")
    return net.finish(
        {"x": (FLOAT, ["N", 6])}, net.op("MatMul", "first", net.weight("v", 6, 3), out="y"), 3
    )


def test_a_merged_model_that_usual_sessions_compute_otherwise_leads_to_advice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on processors without VNNI, whose integer kernels saturate near the range's end."""

    def saturate(*given: object, level: str, **named: object) -> list[Arrays]:
        outputs = run_merged(*given, level=level, **named)  # type: ignore[arg-type]
        batches = given[2]
        assert isinstance(batches, Sequence)
        assert (batches[-1]["x"] > 0.9 * 2.54).mean() > 0.5
        if level == "usual":
            outputs[-1]["y"] = outputs[-1]["y"] * 0.5
        return outputs

    monkeypatch.setattr(f"{COMPARISONS}.run_merged", saturate)
    cut(build_quantized(64), at="first", loss="mse", check=True)
    (record,) = caplog.records
    assert "the merged model in a session with ONNX Runtime's usual settings differs by" in (
        record.getMessage()
    )
    assert 'config entry session.disable_quant_qdq to "1"' in record.getMessage()


def test_weights_that_may_saturate_are_told_on_every_processor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cut(build_quantized(65), at="first", loss="mse", check=True)
    told = [record.getMessage() for record in caplog.records]
    assert any("too small products with 'w', without an error" in text for text in told)


CRASH = NativeCrash("it", "ONNX Runtime broke down over it (SIGSEGV)", is_breakdown=True)


def break_down(*_: object, **__: object) -> list[Arrays]:
    raise BrokeDown(str(CRASH)) from CRASH


@pytest.mark.parametrize(
    ("runner", "label"),
    [
        ("run_split", "what the parts predict"),
        ("run_merged", "the merged model"),
        ("run_prepared", "the model prepared for training"),
    ],
)
def test_what_was_made_and_ends_its_process_is_refused(
    runner: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{COMPARISONS}.{runner}", break_down)
    with pytest.raises(NativeCrash, match=rf"^{label}, made from .*SIGSEGV.*cut at another.*check"):
        cut(build_model(), at="second", check=True)


def test_a_model_that_alone_ends_its_process_is_said_not_to_be_compared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(f"{COMPARISONS}.expect", break_down)
    cut(build_model(), at="second", check=True)
    assert "was not compared with its parts" in caplog.text
    monkeypatch.setattr(f"{COMPARISONS}.run_split", break_down)
    with pytest.raises(NativeCrash, match="what the parts predict"):
        cut(build_model(), at="second", check=True)


def build_overflow(bounded: str) -> onnx.ModelProto:
    """Build a model whose tensor ``large`` is infinite for usual inputs."""
    net = Net()
    net.op("MatMul", "x", net.weight("w0", 6, 6), out="first")
    net.op("Mul", "first", net.constant("steep", np.array(60, np.float32)), out="second")
    net.op("Softplus", net.op("Exp", "second", out="large"), out="bent")
    net.op(bounded, "bent", out="third")
    net.op("Sub", "third", "first", out="gap")
    return net.finish({"x": (FLOAT, ["N", 6])}, "gap", 6)


@pytest.mark.parametrize("bounded", ["Identity", "Sigmoid"])
def test_a_model_that_overflows_is_compared_with_smaller_inputs(bounded: str) -> None:
    cut(build_overflow(bounded), at=None, check=True)


@pytest.mark.parametrize("bounded", ["Identity", "Sigmoid"])
def test_a_fault_in_a_model_that_overflows_is_caught(
    bounded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare_wrongly(*arguments: ir.Model, **options: object) -> PreparedModel:
        prepared = prepare(*arguments, **options)  # type: ignore[arg-type]
        swap_inputs(prepared.inference.graph)
        return prepared

    monkeypatch.setattr(f"{PARTITIONS}.prepare", prepare_wrongly)
    with pytest.raises(DifferentResult, match="largest value in 'gap'"):
        cut(build_overflow(bounded), at=None, check=True)
