"""Models run in another process; a bundle's parts run there as both parties would."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest

from splitonnx.errors import NativeCrash
from splitonnx.partitioner.cutting.conformance.dataflow import (
    BrokeDown,
    EvaluatorFailed,
    Level,
    NotRun,
    expose,
    has_poolings,
    inline_weights,
    refuse_breakdowns,
    run_original,
    run_reference,
    run_session,
    run_split,
)
from splitonnx.partitioner.native import workers
from splitonnx.partitioner.partitions import cut
from tests.support import small_models
from tests.support.nets import FLOAT, Arrays, Net
from tests.support.zoo import build_chain, build_two_streams

BATCHES = [
    {"x": np.random.default_rng(rows).standard_normal((rows, 6)).astype(np.float32)}
    for rows in (2, 3)
]


def evaluate(model: onnx.ModelProto) -> list[np.ndarray]:
    return [small_models.evaluate(model, batch)[model.graph.output[0].name] for batch in BATCHES]


def test_both_evaluators_run_every_batch() -> None:
    model = build_chain()
    content, name = model.SerializeToString(), model.graph.output[0].name
    for made in (
        run_reference(content, BATCHES, "it"),
        run_session(content, BATCHES, "it", level="none"),
    ):
        for outputs, expected in zip(made, evaluate(model), strict=True):
            np.testing.assert_allclose(outputs[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("at", "tail_at"), [(None, ()), (["r1", "g2"], ())])
def test_the_parts_of_a_bundle_predict_as_the_whole(
    at: list[str] | None, tail_at: tuple[str, ...]
) -> None:
    model = build_two_streams()
    bundle = cut(model, at=at, tail_at=tail_at)
    name = model.graph.output[0].name
    for values, expected in zip(run_split(bundle, BATCHES, "it"), evaluate(model), strict=True):
        np.testing.assert_allclose(values[name], expected, rtol=1e-5, atol=1e-6)


def test_the_three_stages_of_a_u_shaped_cut_run_in_order() -> None:
    net = Net()
    first = net.op("Relu", net.op("MatMul", "x", net.weight("w0", 6, 6), out="m0"), out="first")
    last = net.op("Relu", net.op("MatMul", first, net.weight("w1", 6, 6), out="m1"), out="last")
    model = net.finish(
        {"x": (FLOAT, ["N", 6])}, net.op("MatMul", last, net.weight("w2", 6, 3), out="y"), 3
    )
    bundle = cut(model, at="first", tail_at="last")
    for values, expected in zip(run_split(bundle, BATCHES, "it"), evaluate(model), strict=True):
        np.testing.assert_allclose(values["y"], expected, rtol=1e-5, atol=1e-6)


def test_inputs_that_a_model_refuses_are_told() -> None:
    content = build_chain().SerializeToString()
    wrong = [{"x": np.zeros((2, 7), np.float32)}]
    with pytest.raises(NotRun):
        run_session(content, wrong, "it", level="none")
    with pytest.raises(NotRun):
        run_reference(content, wrong, "it")


def test_every_tensor_of_an_exposed_model_is_an_output() -> None:
    model = expose(build_chain())
    (values,) = run_session(model.SerializeToString(), BATCHES[:1], "it", level="none")
    assert {name for node in model.graph.node for name in node.output} == values.keys()


def test_weights_that_are_inputs_become_initializers_of_their_type() -> None:
    net = Net()
    model = net.finish(
        {"x": (FLOAT, ["N", 6]), "b": (FLOAT, [6])}, net.op("Add", "x", "b", out="y"), 6
    )
    content = inline_weights(model, {"b": np.arange(6.0), "other": np.ones(2)})
    (values,) = run_session(content, BATCHES[:1], "it", level="none")
    np.testing.assert_allclose(values["y"], BATCHES[0]["x"] + np.arange(6, dtype=np.float32))


@pytest.mark.parametrize("is_breakdown", [True, False])
def test_an_end_of_the_process_is_told_from_a_limit_of_time(
    is_breakdown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise NativeCrash("it", "ONNX Runtime ended", "look", is_breakdown)

    def run(batches: Sequence[Arrays]) -> list[Arrays]:
        return run_session(b"", batches, "it", level="none")

    monkeypatch.setattr(workers, "call", crash)
    with pytest.raises(NotRun, match="ONNX Runtime ended") as caught:
        run(BATCHES)
    assert isinstance(caught.value, BrokeDown) == is_breakdown
    expected = NativeCrash if is_breakdown else NotRun
    with pytest.raises(expected, match="ONNX Runtime ended"):
        refuse_breakdowns(run, "the parts", "it")(BATCHES)


def build_upsampling() -> onnx.ModelProto:
    """Build an Upsample of opset 7, which onnx's reference evaluator cannot read."""
    net = Net(opset=7)
    net.op("Upsample", "x", out="y", mode="nearest", scales=[1.0, 1.0, 2.0, 2.0])
    return net.finish({"x": (FLOAT, ["N", 3, 4, 4])}, "y", 3, 8, 8)


def test_a_mistake_of_the_reference_evaluator_is_told_as_its_own() -> None:
    batch = {"x": np.ones((1, 3, 4, 4), np.float32)}
    content = build_upsampling().SerializeToString()
    with pytest.raises(EvaluatorFailed, match="cannot run it, by a mistake of its own"):
        run_reference(content, [batch], "it")
    (made,) = run_session(content, [batch], "it", level="none")
    np.testing.assert_array_equal(made["y"], np.ones((1, 3, 8, 8)))


@pytest.mark.parametrize("error", [BrokeDown, NotRun])
def test_inputs_over_which_only_optimized_poolings_break_down_are_refused(
    error: type[NotRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: bytes, batches: Sequence[Arrays], subject: str, *, level: Level) -> list[Arrays]:
        if level == "all":
            raise error(f"over {subject}")
        return list(batches)

    monkeypatch.setattr(f"{run_original.__module__}.run_session", run)
    assert run_original(b"", BATCHES, "it", is_pooled=False) == BATCHES
    if error is NotRun:
        assert run_original(b"", BATCHES, "it", is_pooled=True) == BATCHES
    else:
        with pytest.raises(BrokeDown, match="over it"):
            run_original(b"", BATCHES, "it", is_pooled=True)


@pytest.mark.parametrize(("operator", "expected"), [("MaxPool", True), ("LpPool", False)])
def test_poolings_are_found_in_bodies_too(operator: str, expected: bool) -> None:
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[N, 2, H, W] x, bool c) => (float[N, 2, R, C] y) {{
            y = If (c) <
                then_branch = t () => (float[N, 2, R, C] a) {{
                    a = {operator} <kernel_shape = [2, 2]> (x)
                }},
                else_branch = e () => (float[N, 2, R, C] b) {{ b = Identity (x) }}
            >
        }}
    """)
    assert has_poolings(model) == expected
