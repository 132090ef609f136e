"""The options of losses: settings within --loss, settings of a single one, files of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from splitonnx.bundles import Bundle
from splitonnx.commands.loss_options import LossOptions, read_loss, read_numbers
from splitonnx.errors import UsageError
from splitonnx.losses import Loss
from tests.support.commands import Command
from tests.support.loss_references import build_network


def test_a_loss_is_read_with_its_settings() -> None:
    text = (
        "cross-entropy,output=logits,labels=y,weight=0.5,label-smoothing=0.1,class-axis=-1,"
        "class-weights=1:2:0.5,ignore-index=-100,sample-weights=w,name=a"
    )
    assert read_loss(text) == Loss(
        output="logits",
        labels="y",
        weight=0.5,
        label_smoothing=0.1,
        class_axis=-1,
        class_weights=(1, 2, 0.5),
        ignore_index=-100,
        sample_weights="w",
        name="a",
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("mse,y", "'y' is not a setting"),
        ("mse,outputs=y", "'outputs=y' is not a setting"),
        ("mse,output=", "'output=' is not a setting"),
        ("mse,weight=much", "weight: 'much' is not a number"),
        ("mse,ignore-index=1.5", "ignore-index: '1.5' is not an integer"),
        ("mse,output=y,output=z", "output is given twice"),
    ],
)
def test_a_setting_of_the_wrong_form_is_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        read_loss(text)


def test_options_are_settings_of_a_single_loss() -> None:
    assert LossOptions().read_losses() == Loss()
    options = LossOptions(
        loss=["cross-entropy,output=y"],
        label_smoothing=0.1,
        class_weights="1,2",
        ignore_index=0,
        sample_weights="w",
    )
    assert options.read_losses() == Loss(
        output="y", label_smoothing=0.1, class_weights=(1, 2), ignore_index=0, sample_weights="w"
    )
    with pytest.raises(UsageError, match="--ignore-index does not say which loss it is for"):
        LossOptions(loss=["cross-entropy", "mse"], ignore_index=0).read_losses()
    with pytest.raises(UsageError, match="--ignore-index is given twice"):
        LossOptions(loss=["cross-entropy,ignore-index=1"], ignore_index=0).read_losses()


def test_class_weights_are_read_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.array([1, 2.5]))
    (tmp_path / "w.txt").write_text("1, 2.5\n")
    np.save(tmp_path / "square.npy", np.eye(2))
    (tmp_path / "broken.npy").write_bytes(b"no array")
    for name in ("w.npy", "w.txt"):
        assert read_numbers("--class-weights", str(tmp_path / name), ",") == (1, 2.5)
    with pytest.raises(UsageError, match="not a vector"):
        read_numbers("--class-weights", str(tmp_path / "square.npy"), ",")
    for name in ("broken.npy", "absent.txt"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_numbers("--class-weights", str(tmp_path / name), ",")


def test_cut_and_train_local_take_them(command: Command, tmp_path: Path) -> None:
    onnx.save(build_network(outputs=2), tmp_path / "model.onnx")
    command.succeed(
        "cut", tmp_path / "model.onnx", "--at", "hidden", "--send-labels", "-o", tmp_path / "b",
        "--loss", "cross-entropy,ignore-index=-100", "--loss", "mse,output=scores2,labels=side",
    )  # fmt: skip
    losses = Bundle.load(tmp_path / "b").manifest.recipe.losses
    assert [(loss.name, loss.ignore_index, loss.array) for loss in losses] == [
        ("scores", -100, "labels"),
        ("scores2", None, "side"),
    ]
    labels = np.array([0, -100, 3, 1])
    np.savez(tmp_path / "data.npz", x=np.ones((4, 3), np.float32), labels=labels)
    command.succeed(
        "train", tmp_path / "model.onnx", "--local", "--data", tmp_path / "data.npz",
        "--ignore-index", "-100", "--class-weights", "1,2,3,4", "--quiet",
    )  # fmt: skip
