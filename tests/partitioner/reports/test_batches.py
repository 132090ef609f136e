"""A batch that an export fixed: in the inputs, or in constants of the graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from splitonnx.partitioner.cutting.conformance import freeing_trials
from splitonnx.partitioner.cutting.conformance.freeing_trials import Trials
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.adjustments import Adjustments
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.batches import remark_on_batches
from splitonnx.partitioner.reports.remarks import Remark
from tests.support.nets import FLOAT, Net


def list_remarks(model: onnx.ModelProto, producer: str = "") -> list[Remark]:
    trials = Trials(source=model)
    return list(remark_on_batches(prepare(open_model(model)), "y", producer, trials))


def build_reshape(*target: int) -> onnx.ModelProto:
    """Reshape (B, 8) to a target and flatten it."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, 8), out="m")
    value = net.op("Reshape", value, net.constant("target", np.array(target)), out="r")
    value = net.op("Flatten", value, out="f", axis=0)
    return net.finish({"x": (FLOAT, ["B", 4])}, net.op("Relu", value, out="y"), "M")


@pytest.mark.parametrize("target", [(3, 2, 4), (2, 3, 4), (24,)])
def test_a_constant_that_holds_the_batch_is_named_with_its_size(target: tuple[int, ...]) -> None:
    (remark,) = list_remarks(build_reshape(*target))
    assert remark.names == ("r_node",)
    assert "a batch of 3" in remark.sentence
    assert remark.options == ("--dim B=3",)


def test_a_split_of_the_batch_into_constant_sizes_fixes_it() -> None:
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, 8), out="m")
    net.op("Split", value, net.constant("sizes", np.array([1, 2])), out="s", axis=0)
    net.nodes[-1].output.append("s2")
    value = net.op("MatMul", "s", net.op("Transpose", "s2", out="t", perm=[1, 0]), out="y")
    (remark,) = list_remarks(net.finish({"x": (FLOAT, ["B", 4])}, value, 2))
    assert (remark.names, remark.options) == (("s_node",), ("--dim B=3",))


@pytest.mark.parametrize("target", [(-1, 2, 4), (0, 2, 4), (1, -1, 4)])
def test_a_target_that_follows_the_batch_calls_for_no_remark(target: tuple[int, ...]) -> None:
    assert list_remarks(build_reshape(*target)) == []


def build_single() -> onnx.ModelProto:
    """Swap the axes of (B, T, 8), and reshape them to (T, 1, 8) with the length that it reads."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, 8), out="m")
    value = net.op("Transpose", value, out="t", perm=[1, 0, 2])
    length = net.op("Shape", "x", out="length", start=1, end=2)
    rest = net.constant("rest", np.array([1, 8]))
    target = net.op("Concat", length, rest, out="target", axis=0)
    value = net.op("Reshape", value, target, out="r")
    return net.finish({"x": (FLOAT, ["B", "T", 4])}, net.op("Relu", value, out="y"), 1, 8)


def test_a_batch_of_1_within_a_computed_shape_is_found_by_trying_two_samples() -> None:
    (remark,) = list_remarks(build_single())
    assert "takes a batch of 1 only" in remark.sentence
    assert "node 'r_node' (Reshape) fails" in remark.sentence
    assert remark.options == ("--dim B=1",)


def test_a_batch_that_the_user_fixed_calls_for_no_remark() -> None:
    model, own = build_single(), Adjustments(dims={"B": 1})
    prepared = prepare(open_model(model, own), adjustments=own)
    assert list(remark_on_batches(prepared, "y", "", Trials(source=model))) == []


def test_cut_says_that_the_model_takes_one_sample_only(caplog: pytest.LogCaptureFixture) -> None:
    cut(build_single(), at="m", loss="mse", check=True)
    assert "takes a batch of 1 only" in caplog.text
    assert "--dim B=1" in caplog.text
    caplog.clear()
    cut(build_single(), at="m", loss="mse", check=True, dims={"B": 1})
    assert "batch of 1 only" not in caplog.text


def test_a_class_token_of_one_sample_is_freed_before() -> None:
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, 4), out="m")
    value = net.op("Concat", net.weight("token", 1, 1, 4), value, out="c", axis=1)
    model = net.finish({"x": (FLOAT, ["B", 5, 4])}, net.op("Relu", value, out="y"), 6, 4)
    assert list_remarks(model) == []
    assert prepare(open_model(model)).freed == ("c_node",)


def test_first_states_of_a_recurrence_fix_the_batch() -> None:
    net = Net()
    net.constant("h0", np.zeros((1, 2, 3), np.float32))
    weights = net.weight("wi", 1, 9, 4), net.weight("wr", 1, 9, 3)
    value = net.op("GRU", "x", *weights, "", "", "h0", out="y", hidden_size=3)
    model = net.finish({"x": (FLOAT, [5, "B", 4])}, value, 1, 2, 3)
    (remark,) = [r for r in list_remarks(model) if r.names == (f"{value}_node",)]
    assert "a size of 2" in remark.sentence
    assert remark.options == ("--dim B=2",)


def fix_batch(size: int, kind: str = "Relu", **attributes: int) -> onnx.ModelProto:
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, 3), out="m")
    model = net.finish({"x": (FLOAT, [size, 4])}, net.op(kind, value, out="y", **attributes), 3)
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = size
    return model


@pytest.mark.parametrize("size", [1, 16])
def test_inputs_that_fix_the_batch_are_named_with_the_way_out(size: int) -> None:
    (remark,) = list_remarks(fix_batch(size))
    assert remark.names == ("x",)
    assert f"fixed at {size}" in remark.sentence
    assert remark.sentence.endswith("--dim x:0=N frees it")
    assert f"--batch-size {size}" in remark.sentence
    (remark,) = list_remarks(fix_batch(size), "pytorch 2.6.0")
    assert "dynamic_axes={'x': {0: 'N'}, 'y': {0: 'N'}}" in remark.sentence


def test_an_option_that_cut_would_refuse_is_not_advised() -> None:
    (remark,) = list_remarks(fix_batch(1, "Softmax", axis=0))
    assert remark.options == ()
    assert remark.sentence.endswith(
        "export again with a dynamic batch; with --dim x:0=N, node 'y_node' (Softmax) would mix or "
        "drop samples, so cut refuses it"
    )


def test_an_option_that_is_not_tried_is_advised_with_a_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(freeing_trials, "USUAL_BYTES", 10)
    (remark,) = list_remarks(fix_batch(1, "Softmax", axis=0))
    assert remark.options == ("--dim x:0=N",)
    assert "--dim x:0=N frees it; --dim x:0=N: nodes that the exporter wrote" in remark.sentence
    assert "may mix samples, which was not checked" in remark.sentence


@pytest.mark.parametrize(("rows", "expected"), [(7, ["--dim T=7"]), (1, [])])
def test_a_table_of_positions_fixes_the_length(rows: int, expected: list[str]) -> None:
    net = Net()
    value = net.op("Add", "x", net.weight("positions", 1, rows, 4), out="p")
    value = net.op("MatMul", value, net.weight("w", 4, 3), out="y")
    model = net.finish({"x": (FLOAT, ["B", "T", 4])}, value, "T", 3)
    remarks = list_remarks(model)
    assert [option for remark in remarks for option in remark.options] == expected
    assert all("a size of 7" in remark.sentence for remark in remarks)
