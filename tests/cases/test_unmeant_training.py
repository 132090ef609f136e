"""What training would do that the author did not mean: told by ``check``, settled by an option."""

from __future__ import annotations

import logging
import shlex

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from splitonnx.manifests import Role
from splitonnx.names import Target
from splitonnx.optimizers import SGD
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import Check, check
from splitonnx.partitioner.reports.remarks import Kind, Remark
from splitonnx.verifications import verify
from tests.end_to_end.test_exports import FOLDER
from tests.support.case_trials import TARGETS, run_step
from tests.support.small_models import hold_predictions, hold_step, load_data, load_model
from tests.support.zoo import ZOO

NORMALIZED = [
    ("24_bn_small_batch", "r", ["w1", "b1", "g", "be", "w2", "b2"]),
    ("36_bn_untracked", "r", ["k", "g", "be", "fw", "fb"]),
]
EPSILON = 1e-5


def find(name: str, kind: Kind) -> Remark:
    """Check a small model and return its only remark of a kind."""
    (remark,) = [remark for remark in check(load_model(name)).remarks if remark.kind is kind]
    return remark


def list_roles(model: onnx.ModelProto, *options: str) -> dict[str, str]:
    """Cut a model nowhere, with options as ``check`` writes them, and return each weight's role."""
    words = [shlex.split(option) for option in options]
    train, freeze = (
        [value for option, value in words if option == name] for name in ("--train", "--freeze")
    )
    bundle = cut(model, at=None, train=train, freeze=freeze)
    stored = {tensor.name for tensor in model.graph.initializer}
    state = bundle.client.manifest.state
    return {spec.tensor.name: spec.role for spec in state if spec.tensor.name in stored}


def list_changes(model: onnx.ModelProto, option: str) -> dict[str, str]:
    """Return the weights that an option gives another role, with that role."""
    before, after = list_roles(model), list_roles(model, option)
    return {name: role for name, role in after.items() if before[name] != role}


def test_the_mean_and_deviation_of_images_keep_their_value_unless_named() -> None:
    remark = find("08_buffers", Kind.INPUT_SCALING)
    assert remark.names == ("mean", "std")
    assert remark.options == ("--train '^(mean|std)$'",)
    changes = list_changes(load_model("08_buffers"), remark.options[0])
    assert changes == {"mean": Role.PARAMETER, "std": Role.PARAMETER}


def test_tables_and_cosine_kernels_are_told_and_frozen_by_the_option_shown() -> None:
    remark = find("08_buffers", Kind.COMPUTED_TABLE)
    assert remark.names == ("pe", "dft")
    assert remark.options == ("--freeze '^(pe|dft)$'",)
    changes = list_changes(load_model("08_buffers"), remark.options[0])
    assert changes == {"pe": Role.FROZEN, "dft": Role.FROZEN}


@pytest.mark.parametrize("target", TARGETS)
def test_with_the_option_training_changes_learned_weights_alone(target: Target) -> None:
    model, data = load_model("08_buffers"), load_data("08_buffers", rows=4)
    learned = ["k", "kb", "w1", "fw", "fb"]
    bundle = cut(model, at=None, freeze=["^(pe|dft)$"], client_target=target, server_target=target)
    hold_predictions(bundle, model, data)
    hold_step(bundle, model, data, learned)
    split = cut(
        model, at="c", freeze=["^(pe|dft)$"], optimizer=SGD(lr=0.1),
        client_target=target, server_target=target,
    )  # fmt: skip
    compared = verify(split, load_data("08_buffers"), batch_size=4, steps=1)
    assert compared.ok
    assert set(compared.steps[0].differences) == {"loss", *learned}


def test_cut_says_what_it_keeps_unless_it_was_told(caplog: pytest.LogCaptureFixture) -> None:
    model = load_model("08_buffers")
    with caplog.at_level(logging.WARNING, "splitonnx"):
        cut(model, at="c")
    (record,) = caplog.records
    assert "'mean', 'std': not trained" in record.getMessage()
    assert "--train '^(mean|std)$'" in record.getMessage()
    caplog.clear()
    cut(model, at="c", train=["^(mean|std)$"])
    cut(model, at="c", freeze=["^(mean|std)$"])
    assert caplog.records == []


def test_a_matrix_stored_twice_is_told() -> None:
    remark = find("30_lost_tie", Kind.LOST_TIE)
    assert remark.names == ("shared.weight", "onnx::MatMul_1430")
    assert "(transposed)" in remark.sentence
    assert remark.options == ("--tie shared.weight=onnx::MatMul_1430",)


@pytest.mark.parametrize("name", ["24_bn_small_batch", "36_bn_untracked"])
def test_statistics_that_are_the_initial_ones_are_told(name: str) -> None:
    assert "mean 0, variance 1" in find(name, Kind.INITIAL_STATISTICS).sentence
    kinds = {remark.kind for remark in check(load_model(name)).remarks}
    assert (Kind.UNTRACKED_STATISTICS in kinds) == (name == "36_bn_untracked")


@pytest.mark.parametrize("target", TARGETS)
def test_running_variances_are_those_of_onnx_which_divide_by_n(
    target: Target,
) -> None:
    model, data = load_model("24_bn_small_batch"), load_data("24_bn_small_batch", rows=4)
    bundle = cut(model, at=None, client_target=target, server_target=target)
    next_variance = run_step(bundle, data)["nv"]
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    hidden = data["x"] @ weights["w1"] + weights["b1"]
    np.testing.assert_allclose(next_variance, 0.9 + 0.1 * hidden.var(0), rtol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "at", "trained"), NORMALIZED)
def test_initial_statistics_predict_and_train_as_onnx_says(
    name: str, at: str, trained: list[str], target: Target
) -> None:
    model, data = load_model(name), load_data(name)
    meant = load_model(name)  # in inference mode
    for node in meant.graph.node:
        if node.op_type == "BatchNormalization":
            del node.output[1:]
            del node.attribute[:]
            node.attribute.add(name="epsilon", type=onnx.AttributeProto.FLOAT, f=EPSILON)
    bundle = cut(model, at=at, client_target=target, server_target=target)
    hold_predictions(bundle, meant, data)
    assert verify(bundle, data, batch_size=8).ok
    whole = cut(model, at=None, client_target=target, server_target=target)
    hold_step(whole, model, load_data(name, 4), trained)


def test_a_lost_detach_is_told_with_the_tensor_to_stop_at() -> None:
    remark = find("41_lost_detach", Kind.LOST_DETACH)
    assert remark.names == ("s", "z")
    assert remark.options == ("--stop-gradient e",)


@pytest.mark.parametrize("name", ["07_softmax_clip", "07_softmax_identity"])
def test_a_softmax_before_cross_entropy_is_said_to_be_skipped(name: str) -> None:
    assert find(name, Kind.ACTIVATION_SKIPPED).names == ("y", "z")


def test_two_axes_that_may_hold_the_classes_are_told() -> None:
    remark = find("06_last_axis_classes", Kind.CLASS_AXIS)
    assert remark.options == ("--class-axis 1", "--class-axis -1")


def test_a_batch_in_constants_is_told_with_its_node() -> None:
    remark = find("12_batch_baked", Kind.BATCH)
    assert "'r', 'f' have a batch of 1" in remark.sentence


def test_a_batch_that_the_export_fixed_is_told_and_the_model_trains_by_it() -> None:
    remark = find("42_fixed_batch", Kind.FIXED_BATCH)
    assert remark.sentence.endswith("--dim x:0=N frees it")
    assert "--batch-size 1" in remark.sentence
    bundle = cut(load_model("42_fixed_batch"), at="b")
    assert verify(bundle, load_data("42_fixed_batch"), batch_size=1, steps=2).ok


@pytest.mark.parametrize("form", [np.float64, np.float16])
def test_other_types_and_names_change_nothing_else(form: type) -> None:
    model = load_model("08_buffers")
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(form), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(form))
    del model.graph.value_info[:]
    *found, precision = check(model).remarks
    assert [remark.names for remark in found] == [("mean", "std"), ("pe", "dft")]
    assert precision.kind is Kind.PRECISION


HARMLESS = {
    Kind.ACTIVATION_SKIPPED, Kind.DICTIONARIES, Kind.DROPOUT_OFF, Kind.FROZEN_BATCHNORM,
    Kind.INITIAL_STATISTICS, Kind.QUANTIZED,
}  # fmt: skip
"""What is true of some exports: of models that were never trained, and of those that end so."""
EXPORTS = [
    "jax-cnn",
    "keras-cnn",
    "sklearn-pipeline",
    "torch-cnn-legacy",
    "torch-transformer-legacy",
]


def list_doubts(found: Check) -> list[str]:
    return [w.name for layer in found.layers for w in layer.weights if w.doubt is not None]


@pytest.mark.parametrize("name", EXPORTS)
def test_plain_exports_have_no_suspects(name: str) -> None:
    found = check(FOLDER / f"{name}.onnx")
    assert {remark.kind for remark in found.remarks} <= HARMLESS
    assert list_doubts(found) == []


@pytest.mark.parametrize("name", ["chain", "residual", "batchnorm_trained", "dropout", "attention"])
def test_models_of_the_zoo_call_for_no_remark(name: str) -> None:
    found = check(ZOO[name].build())
    assert found.remarks == ()
    assert list_doubts(found) == []
