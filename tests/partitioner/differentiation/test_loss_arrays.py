"""What losses read beside the model's outputs, and settings that do not fit."""

from __future__ import annotations

import pytest

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.losses import Loss
from splitonnx.partitioner.partitions import cut
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
