"""What losses read beside the model's outputs, and settings that do not fit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from splitonnx.errors import UnsupportedModel, UsageError, ValueOutOfRange
from splitonnx.losses import Loss
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.tensors import TensorSpec
from tests.support.loss_references import build_network
from tests.support.nets import FLOAT, Net


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (Loss(kind="mse", label_smoothing=0.1), "--label-smoothing is for cross-entropy"),
        (Loss(kind="l1", class_weights=(1.0,)), "--class-weights is for cross-entropy"),
        (Loss(kind="bce-with-logits", ignore_index=0), "--ignore-index is for cross-entropy"),
        (Loss(class_weights=(1.0, 2.0)), "2 numbers, but output 'scores' has 4 classes"),
        (Loss(sample_weights=""), "--sample-weights is empty"),
        (Loss(sample_weights="x"), "the model has a tensor of this name"),
        (Loss(sample_weights="labels"), "the losses read 'labels' as I64"),
        (Loss(kind="hinge"), "there is no loss 'hinge'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_does_not_fit_is_refused(loss: Loss, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        cut(build_network(), at=None, loss=loss)


def test_a_loss_of_the_model_reads_no_arrays() -> None:
    with pytest.raises(UnsupportedModel, match="a loss is a float32 scalar"):
        cut(build_network(), at=None, loss=Loss(kind="from-model", sample_weights="trust"))


def test_an_output_whose_rank_a_size_decides_names_the_option_that_fixes_it() -> None:
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, 2), out="m")
    value = net.op("Squeeze", value, out="s")
    model = net.finish({"x": (FLOAT, ["N", 1, 4])}, net.op("Sigmoid", value, out="y"))  # (N)
    with pytest.raises(UnsupportedModel, match=r"'s_node' \(Squeeze\).* --dim N=SIZE"):
        cut(model, at=None, loss="mse")
    assert cut(model, at=None, loss="mse", dims={"N": 3}).client


def test_scores_of_one_class_may_lose_their_axis() -> None:
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, 1), out="m")
    model = net.finish({"x": (FLOAT, ["N", 4])}, net.op("Squeeze", value, out="y"))
    labels = cut(model, at=None, loss="mse").client.manifest.phase("train").data[1]
    assert labels.shape == ("N",)


def test_several_losses_may_share_their_labels_but_not_in_two_meanings() -> None:
    shared = [Loss(), Loss(kind="cross-entropy", label_smoothing=0.5, name="soft")]
    assert cut(build_network(), at=None, loss=shared).client.manifest.phase("train").data[1:] == (
        TensorSpec(name="labels", dtype="I64", shape=("N",), bounds=(0, 4)),
    )
    with pytest.raises(UsageError, match="read 'labels' as I64"):
        cut(build_network(), at=None, loss=["cross-entropy", "mse"])


def build_named(output: str, source: str = "x") -> onnx.ModelProto:
    """A model whose second output has a name, and its input another."""
    net = Net()
    net.op("MatMul", source, net.weight("w", 4, 5), out="h")
    net.op("MatMul", "h", net.weight("v", 5, 3), out="y")
    net.op("MatMul", "h", net.weight("u", 5, 2), out=output)
    model = net.finish({source: (FLOAT, ["N", 4])}, "y", 3)
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, FLOAT, ["N", 2]))
    return model


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("accuracy", "output 'accuracy': training returns a result of the loss .* output_names"),
        ("loss", "output 'loss': .* --loss from-model if the output is itself the loss"),
        ("labels", "output 'labels': the loss reads its labels .* with --labels, or export"),
        ("accuracy@counted", "output 'accuracy@counted': training returns a result"),
        ("loss@counted", "output 'loss@counted': training returns a result"),
    ],
)
def test_a_name_that_a_loss_needs_is_refused_with_what_to_rename(output: str, told: str) -> None:
    with pytest.raises(UnsupportedModel, match=told):
        cut(build_named(output), at=None)
    with pytest.raises(UnsupportedModel, match=told.replace("output", "input")):
        cut(build_named("z", output), at=None)


def test_what_a_refused_name_advises_is_accepted() -> None:
    assert cut(build_named("labels"), at=None, labels="classes").manifest.recipe.labels == "classes"
    first, second = Loss(kind="mse", output="y"), Loss(kind="mse", output="loss.y", labels="z")
    with pytest.raises(UnsupportedModel, match=r"'loss.y'.*--loss mse,name=y2"):
        cut(build_named("loss.y"), at=None, loss=[first, second])
    named = Loss(kind="mse", output="y", name="y2")
    bundle = cut(build_named("loss.y"), at=None, loss=[named, second], check=False)
    assert len(bundle.manifest.recipe.list_losses()) == 2


@pytest.mark.parametrize("work", ["step", "evaluate"])
@pytest.mark.parametrize("kind", ["cross-entropy", "mse"])
def test_negative_weights_of_samples_are_refused(kind: str, work: str) -> None:
    loss = Loss(kind=kind, sample_weights="shares")
    labels = np.arange(4) if kind == "cross-entropy" else np.zeros((4, 4), np.float32)
    data = {"x": np.ones((4, 3), np.float32), "labels": labels}
    bundle = cut(build_network(), at=None, loss=loss)
    with Client(bundle.client, threads=1) as client:
        weights = {name: array.copy() for name, array in client.state().items()}
        wrong = {**data, "shares": np.array([1, -0.5, 1, 0], np.float32)}
        with pytest.raises(ValueOutOfRange, match=r"'shares' holds -0.5; allowed are 0 to"):
            getattr(client, work)(wrong)
        for name, array in client.state().items():
            np.testing.assert_array_equal(array, weights[name])
        getattr(client, work)({**data, "shares": np.array([1, 0.5, 1, 0], np.float32)})
