"""What would be trained or kept unmeant: each remark's option, when followed, does what it says."""

from __future__ import annotations

import shlex

import numpy as np
import onnx
import pytest

import splitonnx
from splitonnx.manifests import Role
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.remarks import Kind, Remark
from splitonnx.partitioner.reports.suspects import (
    find_computed,
    remark_on_computed,
    remark_on_conditional,
    remark_on_kept,
)
from tests.support.nets import FLOAT, Net


def build_sound_model() -> onnx.ModelProto:
    """Mel features, a position table and a fixed blur, with names that a pattern must escape."""
    net, ramp = Net(), np.arange(10)[:, None]
    bins = np.clip(1 - np.abs(np.arange(12) - 3 * np.arange(4)[:, None]) / 3, 0, None)
    net.constant("front|end.mel(1)", bins.T.astype(np.float32))
    net.constant("pe+", np.sin(ramp * 0.9 ** np.arange(4)).astype(np.float32)[None])
    net.constant("blur", (np.outer([1, 2, 1], [1, 2, 1]) / 16)[None, None].astype(np.float32))
    value = net.op("MatMul", "x", "front|end.mel(1)", out="m")
    value = net.op("MatMul", value, net.weight("w", 4, 4), out="h")
    value = net.op("Add", value, "pe+", out="p")
    axis = net.constant("axis", np.array([1]))
    value = net.op("Conv", net.op("Unsqueeze", value, axis, out="u"), "blur", out="b")
    value = net.op("Flatten", value, out="f")
    output = net.op("MatMul", value, net.weight("w2", 16, 3), out="y")
    return net.finish({"x": (FLOAT, ["N", 10, 12])}, output, 3)


def list_roles(model: onnx.ModelProto, remark: Remark | None = None) -> dict[str, Role]:
    """Prepare a model, with the option that a remark offers."""
    return dict(prepare_with(model, remark).roles)


def prepare_with(model: onnx.ModelProto, remark: Remark | None = None) -> PreparedModel:
    option, value = shlex.split(remark.options[0]) if remark is not None else ("", "")
    train, freeze = ([value] if option == name else [] for name in ("--train", "--freeze"))
    return prepare(open_model(model), train=train, freeze=freeze)


def test_each_suspect_is_told_with_its_reason() -> None:
    reasons = find_computed(prepare_with(build_sound_model()))
    assert reasons.keys() == {"front|end.mel(1)", "pe+", "blur"}
    assert "mel filter bank" in reasons["front|end.mel(1)"]
    assert "sines" in reasons["pe+"]
    assert "fixed filter" in reasons["blur"]


def test_the_pattern_offered_freezes_exactly_what_is_named() -> None:
    model = build_sound_model()
    before = list_roles(model)
    remarks = list(remark_on_computed(find_computed(prepare_with(model))))
    assert [remark.kind for remark in remarks].count(Kind.COMPUTED_TABLE) == 2
    for remark in remarks:
        after = list_roles(model, remark)
        assert {name for name in before if before[name] is not after[name]} == set(remark.names)
        assert all(after[name] is Role.FROZEN for name in remark.names)


def test_a_table_of_codes_is_told_and_weights_of_whole_numbers_elsewhere_are_not() -> None:
    net = Net()
    net.constant("codes", np.eye(4, dtype=np.float32)[:, :3] * 2)
    bias = net.constant("bias", np.array([0, 1, 0], np.float32))
    value = net.op("Gemm", "x", "codes", bias, out="g")
    output = net.op("MatMul", value, net.weight("w", 3, 3), out="y")
    reasons = find_computed(prepare_with(net.finish({"x": (FLOAT, ["N", 4])}, output, 3)))
    assert list(reasons) == ["codes"]
    assert "whole numbers" in reasons["codes"]


def build_rotated(length: int, width: int) -> onnx.ModelProto:
    """Rotate queries by their positions, as one half of the features with the other."""
    net = Net()
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.concatenate([angles, angles], 1)
    net.constant("table1", np.cos(angles).astype(np.float32))
    net.constant("table2", np.sin(angles).astype(np.float32))
    query = net.op("MatMul", "x", net.weight("w", 3, width), out="q")
    half = net.constant("half", np.array([width // 2]))
    zero, end = net.constant("zero", np.array([0])), net.constant("end", np.array([width]))
    axis = net.constant("axis", np.array([2]))
    first = net.op("Slice", query, zero, half, axis, out="q1")
    second = net.op("Neg", net.op("Slice", query, half, end, axis, out="q2"), out="n2")
    turned = net.op("Concat", second, first, out="turned", axis=2)
    own = net.op("Mul", query, "table1", out="own")
    made = net.op("Add", own, net.op("Mul", turned, "table2", out="other"), out="z")
    output = net.op("MatMul", made, net.weight("last", width, 3), out="y")
    return net.finish({"x": (FLOAT, ["N", length, 3])}, output, length, 3)


@pytest.mark.parametrize(("length", "width"), [(2, 4), (2, 8), (3, 4), (4, 4), (7, 2), (12, 8)])
def test_short_tables_of_rotations_are_told_and_frozen_by_the_option(
    length: int, width: int
) -> None:
    model = build_rotated(length, width)
    reasons = find_computed(prepare_with(model))
    assert reasons.keys() == {"table1", "table2"}
    assert all("sines" in reason for reason in reasons.values())
    (remark,) = remark_on_computed(reasons)
    roles = list_roles(model, remark)
    assert {name for name, role in roles.items() if role is Role.FROZEN} == reasons.keys()


def test_what_the_nodes_give_away_is_told_with_its_reason() -> None:
    net = Net()
    norm = net.op("MatMul", net.weight("w", 4, 4), net.weight("b", 4), out="wb")
    norm = net.op("MatMul", net.weight("a", 4), norm, out="norm")
    value = net.op("MatMul", "x", net.op("Div", "w", norm, out="scaled"), out="h")
    net.constant("sizes", np.array([0.1, 0.3], np.float32))
    for step in range(2):
        place = net.constant(f"place{step}", np.array(step))
        size = net.op("Gather", "sizes", place, out=f"size{step}")
        slope = net.op("Tanh", value, out=f"slope{step}")
        change = net.op("Mul", slope, size, out=f"change{step}")
        value = net.op("Add", value, change, out=f"next{step}")
    model = net.finish({"x": (FLOAT, ["N", 4])}, value, 4)
    reasons = find_computed(prepare_with(model))
    assert reasons.keys() == {"a", "b", "sizes"}
    for remark in remark_on_computed(reasons):
        word = "step sizes of a solver" if "sizes" in remark.names else "singular vectors"
        assert word in remark.sentence
        assert list_roles(model, remark)[remark.names[0]] is Role.FROZEN
    assert list_roles(model)["w"] is Role.PARAMETER


def build_normalized(
    mean: np.ndarray, deviation: np.ndarray, kinds: tuple[str, str] = ("Sub", "Div")
) -> onnx.ModelProto:
    net = Net()
    value = net.op(kinds[0], "x", net.constant("mean", mean.astype(np.float32)), out="c")
    value = net.op(kinds[1], value, net.constant("std", deviation.astype(np.float32)), out="d")
    output = net.op("MatMul", value, net.weight("w", 4, 3), out="y")
    return net.finish({"x": (FLOAT, ["N", 5, 4])}, output, 5, 3)


MEAN, DEVIATION = np.array([0.4, 0.5, 0.6, 0.7]), np.array([0.2, 0.3, 0.25, 0.9])


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4)])
@pytest.mark.parametrize("kinds", [("Sub", "Div"), ("Add", "Mul"), ("Mul", "Add")])
def test_what_scales_a_raw_input_keeps_its_value_and_is_told(
    shape: tuple[int, ...], kinds: tuple[str, str]
) -> None:
    model = build_normalized(MEAN.reshape(shape), DEVIATION.reshape(shape), kinds)
    (remark,) = remark_on_kept(prepare_with(model))
    assert set(remark.names) == {"mean", "std"}
    roles = list_roles(model)
    assert (roles["mean"], roles["std"], roles["w"]) == (Role.FROZEN, Role.FROZEN, Role.PARAMETER)
    assert set(list_roles(model, remark).values()) == {Role.PARAMETER}
    assert prepare_with(model, remark).kept_scalings == ()


def test_a_whole_image_is_a_mean_where_it_is_subtracted() -> None:
    image = np.linspace(0.1, 0.9, 20).reshape(5, 4) ** 2
    model = build_normalized(image, DEVIATION)
    assert prepare_with(model).kept_scalings == ("mean", "std")
    added = build_normalized(image, DEVIATION, ("Add", "Mul"))  # as a table of positions is
    assert prepare_with(added).kept_scalings == ()


def test_first_values_of_a_learned_scale_are_trained() -> None:
    model = build_normalized(np.ones(4), np.zeros(4), ("Mul", "Add"))
    assert prepare_with(model).kept_scalings == ()


def build_numbers(numbers: dict[str, float | list[float]]) -> onnx.ModelProto:
    """Multiply by single numbers behind a layer."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, 3), out="h")
    for index, (name, number) in enumerate(numbers.items()):
        stored = net.constant(name, np.array(number, np.float32))
        value = net.op("Mul", value, stored, out=f"m{index}")
    return net.finish({"x": (FLOAT, ["N", 4])}, value, 3)


def test_single_numbers_that_may_be_learned_are_told_and_trained_by_the_option(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build_numbers({"k": [1.2], "block.s": 2.6, "logit_scale": 0.0})
    names = ("k", "block.s", "logit_scale")
    (remark,) = (each for each in check(model).remarks if each.kind is Kind.SINGLE_NUMBERS)
    assert remark.names == names
    assert "single numbers and not trained" in remark.sentence
    splitonnx.cut(model, at="h", send_labels=True, check=False)
    (said,) = (record.getMessage() for record in caplog.records if "single" in record.getMessage())
    assert said.endswith(f"with {remark.options[0]}")
    assert {list_roles(model, remark)[name] for name in names} == {Role.PARAMETER}
    assert prepare_with(model, remark).kept_numbers == ()


def test_numbers_that_are_written_in_code_are_not_told() -> None:
    literals = {"half_scale": 0.5, "scale": 1 / np.sqrt(24), "eps": 1e-5, "number": 1.3}
    assert prepare_with(build_numbers({**literals})).kept_numbers == ()


def build_conditional() -> onnx.ModelProto:
    """A branch that depends on the data and draws numbers, with a weight that only it reads."""
    noise = onnx.helper.make_node("RandomNormalLike", ["h"], ["noise"])
    value = onnx.helper.make_tensor_value_info
    branches = {
        name: onnx.helper.make_graph(
            [noise, onnx.helper.make_node("MatMul", ["h", weight], [f"{name}_out"])],
            name, [], [value(f"{name}_out", FLOAT, None)],
            [onnx.numpy_helper.from_array(np.ones((4, 4), np.float32) * 0.5, weight)],
        )
        for name, weight in (("then_branch", "branch.w"), ("else_branch", "other.w"))
    }  # fmt: skip
    net = Net()
    total = net.op("ReduceSum", "x", out="total", keepdims=0)
    condition = net.op("Cast", total, out="condition", to=onnx.TensorProto.BOOL)
    net.op("Identity", "x", out="h")
    net.op("If", condition, out="chosen", **branches)
    output = net.op("MatMul", "chosen", net.weight("w", 4, 3), out="y")
    return net.finish({"x": (FLOAT, ["N", 4])}, output, 3)


def test_weights_of_a_branch_are_named_with_its_node() -> None:
    (remark,) = remark_on_conditional(prepare_with(build_conditional()))
    assert remark.kind is Kind.CONDITIONAL_WEIGHTS
    assert set(remark.names) == {"branch.w", "other.w"}
    assert "'chosen_node'" in remark.sentence
    assert check(build_conditional()).conditional == 32


def build_norms(scale: str, bias: str, number: float = 1) -> onnx.ModelProto:
    """Put an InstanceNormalization of two channels between two products."""
    net = Net()
    net.op("MatMul", "x", net.weight("w", 4, 6), out="h")
    net.op("Reshape", "h", net.constant("shape", np.array([-1, 2, 3])), out="r")
    net.constant(scale, np.array([1, number], np.float32))
    net.constant(bias, np.zeros(2, np.float32))
    net.op("InstanceNormalization", "r", scale, bias, out="i")
    net.op("Flatten", "i", out="f")
    output = net.op("MatMul", "f", net.weight("w2", 6, 3), out="y")
    return net.finish({"x": (FLOAT, ["N", 4])}, output, 3)


@pytest.mark.parametrize(
    "names", [("/g/Constant_1_output_0", "/Constant_output_0"), ("val_8", "val_11")]
)
def test_ones_and_zeros_that_an_exporter_wrote_for_a_norm_are_told(names: tuple[str, str]) -> None:
    model = build_norms(*names)
    reasons = find_computed(prepare_with(model))
    assert set(reasons) == set(names)
    (remark,) = remark_on_computed(reasons)
    roles = list_roles(model, remark)
    assert {roles[name] for name in names} == {Role.FROZEN}


def test_the_weights_of_a_norm_are_no_constants() -> None:
    assert find_computed(prepare_with(build_norms("i.weight", "i.bias"))) == {}
    assert set(find_computed(prepare_with(build_norms("val_8", "val_11", 2)))) == {"val_11"}


def build_spectral(*names: str) -> onnx.ModelProto:
    """Divide a weight by its product with two vectors, as a spectral norm does."""
    net, (weight, left, right) = Net(), names
    net.op("MatMul", net.weight(weight, 6, 4), net.weight(right, 4), out="p")
    net.op("MatMul", net.weight(left, 6), "p", out="sigma")
    net.op("Div", weight, "sigma", out="normed")
    net.op("MatMul", "x", net.op("Transpose", "normed", out="turned", perm=[1, 0]), out="h")
    output = net.op("MatMul", "h", net.weight("w2", 6, 3), out="y")
    return net.finish({"x": (FLOAT, ["N", 4])}, output, 3)


@pytest.mark.parametrize(
    "names", [("a.weight_orig", "a.weight_u", "a.weight_v"), ("k", "p1", "p2")]
)
def test_the_vectors_of_a_spectral_norm_are_told_whatever_they_are_called(
    names: tuple[str, str, str],
) -> None:
    reasons = find_computed(prepare_with(build_spectral(*names)))
    assert set(reasons) == set(names[1:])
    assert "spectral norm" in reasons[names[1]]


def test_vectors_that_are_only_called_u_and_v_may_be_trained() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("a.weight_orig", 4, 6), out="h")
    net.op("Mul", net.op("Add", "h", net.weight("a.weight_u", 6), out="s"),
           net.weight("a.weight_v", 6), out="y")  # fmt: skip
    assert find_computed(prepare_with(net.finish({"x": (FLOAT, ["N", 4])}, "y", 6))) == {}
