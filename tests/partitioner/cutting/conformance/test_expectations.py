"""What a model computes is said by two evaluators, and what both cannot run is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from splitonnx.partitioner.cutting.conformance.dataflow import BrokeDown, NotRun, run_session
from splitonnx.partitioner.cutting.conformance.expectations import (
    COARSE,
    EXACT,
    Expectation,
    describe_single,
    draw_accepted,
    expect,
    expect_smaller,
    find_overflow,
)
from splitonnx.partitioner.partitions import cut
from tests.support.nets import FLOAT, INT64, Net
from tests.support.small_models import load_model
from tests.support.zoo import build_chain


def make_expectation(reference: float | None, session: float | None) -> Expectation:
    """Make what two evaluators could say of a model whose largest value is 1."""

    def give(value: float | None) -> list[dict[str, np.ndarray]] | None:
        return None if value is None else [{"y": np.array([1.0, value])}]

    return Expectation(
        model=build_chain(), batches=[{}], reference=give(reference), session=give(session)
    )


def test_both_evaluators_run_a_usual_model_at_several_batch_sizes() -> None:
    expectation = expect(build_chain(), "it", 0)
    assert [len(batch["x"]) for batch in expectation.batches] == [2, 3, 5]
    assert expectation.reference is not None
    assert expectation.session is not None
    assert all(noise.size < 1e-5 for noise in expectation.noise.values())


def test_a_model_that_onnx_runtime_cannot_run_is_left_to_the_reference() -> None:
    expectation = expect(load_model("39_lstm_layout1"), "it", 0)
    assert expectation.session is None
    assert expectation.reference is not None


def build_poolings(times: int) -> onnx.ModelProto:
    """Halve images of any size so many times, behind a convolution each."""
    net, value = Net(), "x"
    for n in range(times):
        value = net.op("Conv", value, net.weight(f"w{n}", 16, 16, 3, 3), out=f"c{n}", pads=[1] * 4)
        value = net.op("MaxPool", value, out=f"p{n}", kernel_shape=[2, 2], strides=[2, 2])
    space = net.constant("space", np.array([2, 3]))
    net.op("ReduceMean", value, space, out="y", keepdims=0)
    return net.finish({"x": (FLOAT, ["N", 16, "H", "W"])}, "y", 16)


@pytest.mark.parametrize(("times", "size"), [(2, 8), (5, 32)])
def test_images_are_drawn_so_large_that_a_row_is_left_of_them(times: int, size: int) -> None:
    expectation = expect(build_poolings(times), "it", 0)
    assert [batch["x"].shape for batch in expectation.batches] == [
        (rows, 16, size, size) for rows in (2, 3, 5)
    ]
    assert expectation.reference is not None
    assert expectation.session is not None
    assert not expectation.contradicted


@pytest.mark.parametrize("times", [4, 5])  # of 8 x 8, the last pooling or convolution has no row
def test_poolings_of_images_of_any_size_are_cut_without_a_remark(
    times: int, caplog: pytest.LogCaptureFixture
) -> None:
    cut(build_poolings(times), at="c1", loss="mse", check=True)
    assert not [each for each in caplog.records if each.name.startswith("splitonnx")]


def test_a_model_that_onnx_runtime_never_runs_is_run_at_the_usual_length() -> None:
    net = Net()
    weights = net.weight("w", 1, 12, 4), net.weight("r", 1, 12, 3)
    net.op("LSTM", "x", *weights, out="y", hidden_size=3, layout=1)
    expectation = expect(net.finish({"x": (FLOAT, ["N", "T", 4])}, "y", "T", 1, 3), "it", 0)
    assert expectation.session is None
    assert [batch["x"].shape[:2] for batch in expectation.batches] == [(2, 8), (3, 8), (5, 8)]


def test_a_model_that_works_with_one_sample_alone_is_run_with_it() -> None:
    net = Net()
    one = net.constant("one", np.array([1, 6]))
    model = net.finish({"x": (FLOAT, ["N", 6])}, net.op("Reshape", "x", one, out="y"), 6)
    assert [len(batch["x"]) for batch in expect(model, "it", 0).batches] == [1, 1]


def test_what_takes_one_sample_only_is_said_with_the_node_that_fails() -> None:
    net = Net()
    one = net.constant("one", np.array([1, 6]))
    model = net.finish({"x": (FLOAT, ["N", 6])}, net.op("Reshape", "x", one, out="y"), 6)
    run = partial(run_session, model.SerializeToString(), subject="it", level="none")
    batches = draw_accepted(model, "it", 0)
    assert [len(batch["x"]) for batch in batches] == [1, 1]
    said = describe_single(model, batches, run, "it")
    assert "leave it open as 'N': with 2 samples, node 'y_node' (Reshape) fails" in said
    assert "--dim N=1" in said
    assert describe_single(model, batches, list, "it") == ""
    chain = build_chain()
    assert describe_single(chain, draw_accepted(chain, "it", 0), run, "it") == ""


def build_masked(layer: str) -> onnx.ModelProto:
    """Make a model that counts lengths in a mask of floats: for a GRU or a ReverseSequence."""
    net = Net()
    length = net.op("ReduceSum", "mask", net.constant("axes", np.array([1])), out="s", keepdims=0)
    if layer == "GRU":
        length = net.op("Cast", length, out="lens", to=TensorProto.INT32)
        steps = net.op("Transpose", "x", out="steps", perm=[1, 0, 2])
        weights = net.weight("w", 1, 9, 4), net.weight("r", 1, 9, 3)
        made = net.op("GRU", steps, *weights, "", length, out="states", hidden_size=3)
        made = net.op("Transpose", made, out="back", perm=[2, 1, 0, 3])
    else:
        length = net.op("Cast", length, out="lens", to=INT64)
        value = net.op("MatMul", "x", net.weight("w", 4, 3), out="value")
        made = net.op("ReverseSequence", value, length, out="back", batch_axis=0, time_axis=1)
    made = net.op("Flatten", made, out="flat")
    made = net.op("MatMul", made, net.weight("last", 18, 2), out="y")
    return net.finish({"x": (FLOAT, ["N", 6, 4]), "mask": (FLOAT, ["N", 6])}, made, 2)


@pytest.mark.parametrize("layer", ["GRU", "ReverseSequence"])
def test_lengths_counted_in_a_mask_of_floats_are_run_by_both_evaluators(layer: str) -> None:
    expectation = expect(build_masked(layer), "it", 0)
    assert [len(batch["x"]) for batch in expectation.batches] == [2, 3, 5]
    assert expectation.reference is not None
    assert expectation.session is not None
    assert len({batch["mask"].sum() / len(batch["mask"]) for batch in expectation.batches}) > 1


@pytest.mark.parametrize("layer", ["GRU", "ReverseSequence"])
def test_lengths_counted_in_a_mask_are_not_taken_for_a_batch_of_1(
    layer: str, caplog: pytest.LogCaptureFixture
) -> None:
    cut(build_masked(layer), at="back", loss="mse", check=True)
    assert "batch of 1" not in caplog.text
    assert "not compared" not in caplog.text
    assert "does not run" not in caplog.text


def test_what_fails_with_one_sample_too_is_not_laid_on_the_batch() -> None:
    net = Net()
    one = net.constant("one", np.array([1, 6]))
    model = net.finish({"x": (FLOAT, ["N", 6])}, net.op("Reshape", "x", one, out="y"), 6)

    def refuse(_: object) -> list[dict[str, np.ndarray]]:
        raise NotRun("a length is negative")

    assert describe_single(model, draw_accepted(model, "it", 0), refuse, "it") == ""


def test_integers_are_drawn_small_enough_for_a_table() -> None:
    net = Net()
    model = net.finish(
        {"x": (INT64, ["N", 5])}, net.op("Gather", net.weight("table", 2, 3), "x", out="y"), 5, 3
    )
    expectation = expect(model, "it", 0)
    assert {batch["x"].max() for batch in expectation.batches} == {1}


def test_integers_are_drawn_so_small_that_onnx_runtime_takes_them_too() -> None:
    net = Net()
    net.op("GatherElements", "x", "places", out="y", axis=1)
    model = net.finish({"x": (FLOAT, ["N", 3]), "places": (INT64, ["N", 3])}, "y", 3)
    assert expect(model, "it", 0).session is not None


def test_labels_are_drawn_so_small_that_the_reference_takes_them_too() -> None:
    net = Net()
    net.op("SoftmaxCrossEntropyLoss", "x", "labels", out="y")
    inputs: dict[str, tuple[int, list[int | str]]] = {
        "x": (FLOAT, ["N", 3]),
        "labels": (INT64, ["N"]),
    }
    graph = helper.make_graph(
        net.nodes,
        "loss",
        [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in inputs.items()],
        [helper.make_tensor_value_info("y", FLOAT, [])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    expectation = expect(model, "it", 0)
    assert expectation.reference is not None
    assert max(batch["labels"].max() for batch in expectation.batches) < 3


def test_inputs_of_another_size_are_drawn_if_all_elements_are_equal() -> None:
    net = Net()
    low = net.constant("low", np.array(5, np.float32))
    net.op("Relu", net.op("Sub", "x", low, out="gap"), out="y")
    model = net.finish({"x": (FLOAT, ["N", 6])}, "y", 6)
    expectation = expect(model, "it", 0)
    assert expectation.is_telling
    assert max(batch["x"].max() for batch in expectation.batches) > 5


def test_outputs_that_differ_by_column_alone_tell_nothing_of_the_inputs() -> None:
    net = Net()
    gap = net.op("Sub", "x", net.constant("low", np.array(8, np.float32)), out="gap")
    bias = net.constant("bias", np.array([1, 2, 3], np.float32))
    net.op("Add", net.op("Relu", gap, out="dead"), bias, out="y")
    expectation = expect(net.finish({"x": (FLOAT, ["N", 3])}, "y", 3), "it", 0)
    assert expectation.is_telling
    assert max(batch["x"].max() for batch in expectation.batches) > 8


def build_overflow(*, bounded: bool) -> onnx.ModelProto:
    """Build exp(exp(9 x)), which is infinite for usual inputs, and if bounded, a Sigmoid of it."""
    net = Net()
    net.op("Mul", "x", net.constant("nine", np.array(9, np.float32)), out="steep")
    net.op("Exp", net.op("Exp", "steep", out="large"), out="larger")
    net.op("Sigmoid" if bounded else "Identity", "larger", out="y")
    return net.finish({"x": (FLOAT, ["N", 3])}, "y", 3)


def test_smaller_inputs_are_drawn_if_the_outputs_are_not_finite() -> None:
    expectation = expect(build_overflow(bounded=False), "it", 0)
    assert expectation.is_finite
    assert max(np.abs(batch["x"]).max() for batch in expectation.batches) < 1
    expected = np.exp(np.exp(9 * expectation.batches[0]["x"].astype(np.float64)))
    assert expectation.session is not None
    np.testing.assert_allclose(expectation.session[0]["y"], expected, rtol=1e-4)


def test_outputs_that_are_infinite_for_all_inputs_are_compared_with_usual_ones() -> None:
    net = Net()
    mask = net.constant("mask", np.array([0, -np.inf, 0], np.float32))
    model = net.finish({"x": (FLOAT, ["N", 3])}, net.op("Add", "x", mask, out="y"), 3)
    expectation = expect(model, "it", 0)
    assert not expectation.is_finite
    assert max(batch["x"].max() for batch in expectation.batches) > 1


def test_an_overflow_behind_which_outputs_are_finite_is_found_by_its_tensor() -> None:
    expectation = expect(build_overflow(bounded=True), "it", 0)
    assert expectation.is_finite
    assert find_overflow(expectation, "it") == "larger"
    smaller = expect_smaller(expectation, "it", 0)
    assert smaller is not None
    assert not find_overflow(smaller, "it")


def test_outputs_that_are_always_equal_are_compared_all_the_same() -> None:
    net = Net()
    zero = net.constant("zero", np.zeros(1, np.float32))
    model = net.finish({"x": (FLOAT, ["N", 6])}, net.op("Mul", "x", zero, out="y"), 6)
    assert not expect(model, "it", 0).is_telling


def test_a_model_that_nobody_can_run_is_told() -> None:
    net = Net()
    impossible = net.constant("impossible", np.array([5, 7]))
    model = net.finish({"x": (FLOAT, ["N", 6])}, net.op("Reshape", "x", impossible, out="y"), 7)
    with pytest.raises(NotRun, match="reshape"):
        expect(model, "it", 0)


def test_a_mistake_of_the_reference_evaluator_hides_no_reason_of_the_session() -> None:
    net = Net(opset=7)
    net.op("Upsample", "x", out="twice", mode="nearest", scales=[1.0, 1.0, 2.0, 2.0])
    impossible = net.constant("impossible", np.array([5, 7]))
    net.op("Reshape", "twice", impossible, out="y")
    model = net.finish({"x": (FLOAT, ["N", 3, 4, 4])}, "y", 7)
    with pytest.raises(NotRun, match="reshape") as caught:
        expect(model, "it", 0)
    assert "TypeError" not in str(caught.value)


def test_rounding_of_both_evaluators_widens_what_is_allowed() -> None:
    assert make_expectation(0.5, 0.5).allow("y", 0) == EXACT
    assert make_expectation(0.5, None).allow("y", 0) == EXACT
    assert make_expectation(0.5, 0.5001).allow("y", 0) == pytest.approx(20 * 1e-4)


def test_noise_of_one_batch_does_not_excuse_a_difference_in_another() -> None:
    one, other = np.array([1.0, 0.5]), np.array([1.0, 0.5001])
    expectation = Expectation(
        model=build_chain(),
        batches=[{}, {}],
        reference=[{"y": one}, {"y": one}],
        session=[{"y": one}, {"y": other}],
    )
    assert expectation.allow("y", 1) == pytest.approx(20 * 1e-4)
    wrong = np.array([1.0, 0.501])
    assert not expectation.find_difference([{"y": one}, {"y": wrong}]).size
    assert expectation.find_difference([{"y": wrong}, {"y": one}]).size == pytest.approx(1e-3)


def test_a_contradiction_allows_no_more_but_each_evaluators_result() -> None:
    expectation = make_expectation(0.5, 0.9)
    assert [noise.tensor for noise in expectation.contradicted] == ["y"]
    assert expectation.allow("y", 0) == EXACT
    for value, size in ((0.5, 0), (0.9, 0), (0.7, 0.2)):
        found = expectation.find_difference([{"y": np.array([1.0, value])}])
        assert found.size == pytest.approx(size)


def test_what_rounding_leaves_of_a_sum_that_cancels_out_is_no_contradiction() -> None:
    one = np.array([1.0])
    expectation = Expectation(
        model=build_chain(),
        batches=[{}],
        reference=[{"y": one, "sum": one * 0}],
        session=[{"y": one, "sum": one * 1e-8}],
    )
    assert not expectation.contradicted
    assert [noise.tensor for noise in expectation.cancelled] == ["sum"]
    assert not expectation.find_difference([{"y": one, "sum": one * 3e-8}]).size
    assert expectation.find_difference([{"y": one * 1.1, "sum": one * 0}]).tensor == "y"


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_a_model_in_16_bits_is_allowed_its_coarse_numbers(kind: int) -> None:
    model = build_chain()
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["narrow"], to=kind))
    made = Expectation(model=model, batches=[], reference=[], session=None)
    assert made.least == COARSE


def test_a_quantized_model_is_allowed_its_coarse_numbers() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(build_chain())
    model.graph.node.add(op_type="QuantizeLinear", input=["x", "s"], output=["q"])
    made = Expectation(model=model, batches=[], reference=[], session=None)
    assert made.least == COARSE


def test_that_onnx_runtime_broke_down_is_said_before_what_the_reference_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(kind: type[NotRun]) -> Callable[..., None]:
        def run(*_: object, **__: object) -> None:
            raise kind(kind.__name__)

        return run

    module = "splitonnx.partitioner.cutting.conformance.expectations"
    monkeypatch.setattr(f"{module}.run_original", refuse(BrokeDown))
    monkeypatch.setattr(f"{module}.run_reference", refuse(NotRun))
    with pytest.raises(BrokeDown):
        expect(build_chain(), "it", 0)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_an_unbounded_recurrence_of_many_steps_is_compared(kind: str) -> None:
    net, random = Net(), np.random.default_rng(0)
    gates = {"GRU": 3, "LSTM": 4}[kind]
    activations = ["Sigmoid", "Relu"] if kind == "GRU" else ["Relu"] * 3
    weights = [8 * random.standard_normal((1, gates * 4, n)).astype(np.float32) for n in (3, 4)]
    names = [net.constant(f"W{n}", array) for n, array in enumerate(weights)]
    net.nodes.append(
        helper.make_node(
            kind, ["x", *names], ["", "last"], "layer", hidden_size=4, activations=activations
        )
    )
    net.op("Squeeze", "last", net.constant("axis", np.array([0])), out="state")
    net.op("MatMul", "state", net.weight("V", 4, 2), out="y")
    cut(net.finish({"x": (FLOAT, [60, "N", 3])}, "y", 2), at=None, check=True)


def test_an_output_that_is_never_finite_is_said_not_to_be_compared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = Net()
    first = net.op("MatMul", "x", net.weight("w0", 6, 6), out="first")
    mask = net.constant("mask", np.full(6, -np.inf, np.float32))
    net.op("Softmax", net.op("Add", first, mask, out="masked"), out="y")
    cut(net.finish({"x": (FLOAT, ["N", 6])}, "y", 6), at=None, check=True)
    assert "not compared with its parts in 'y', of which no element is finite" in caplog.text
