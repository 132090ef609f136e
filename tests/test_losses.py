"""Losses as values: their numbers, what they leave open, their names."""

from __future__ import annotations

import msgspec
import pytest

from splitonnx.errors import UsageError
from splitonnx.losses import Loss, complete_losses, is_plain
from splitonnx.manifests import BundleManifest, decode_manifest, encode_manifest
from splitonnx.partitioner.partitions import cut
from tests.support.loss_references import build_network


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"label_smoothing": 1.5}, "from 0 to 1, not 1.5"),
        ({"label_smoothing": float("nan")}, "from 0 to 1"),
        ({"weight": 0.0}, "finite and not 0"),
        ({"class_weights": (1.0, -1.0)}, "at least 0"),
        ({"class_weights": (0.0, 0.0)}, "nothing would be trained"),
        ({"ignore_index": 2**40}, "must be an int32"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Loss(**settings)  # type: ignore[arg-type]


def test_a_loss_gets_what_it_leaves_open() -> None:
    assert complete_losses("mse", "y", None, "target") == (
        Loss(kind="mse", output="y", labels="target"),
    )
    own = Loss(output="z", labels="own", class_axis=2)
    assert complete_losses(own, "y", 1, "target") == (own,)
    first, second = complete_losses(
        ["cross-entropy", Loss(kind="l1", output="z")], "y", -1, "labels"
    )
    assert (first.class_axis, second.class_axis) == (-1, None)
    assert (first.output, second.output) == ("y", "z")


def test_several_losses_have_names_of_their_own() -> None:
    losses = complete_losses(
        ["cross-entropy", "mse", Loss(output="z"), Loss(name="w")], "y", None, "labels"
    )
    assert [loss.name for loss in losses] == ["y.cross-entropy", "y.mse", "z", "w"]
    assert complete_losses(losses, "y", None, "labels") == losses
    with pytest.raises(UsageError, match=r"reported as 'y\.mse'"):
        complete_losses(["mse", "mse"], "y", None, "labels")


def test_no_loss_and_a_weight_of_a_single_one_are_refused() -> None:
    with pytest.raises(UsageError, match="there is no loss"):
        complete_losses([], "y", None, "labels")
    with pytest.raises(UsageError, match="a single loss has no weight"):
        complete_losses(Loss(weight=2.0), "y", None, "labels")


def test_a_recipe_keeps_losses_and_writes_a_plain_one_as_before() -> None:
    plain = cut(build_network(), at=None).manifest
    assert (plain.recipe.losses, is_plain(plain.recipe.list_losses())) == ((), True)
    losses = [
        Loss(ignore_index=-100, class_weights=(1, 2, 3, 4)),
        Loss(label_smoothing=0.1, name="b"),
    ]
    manifest = cut(build_network(), at=None, loss=[losses[0]]).manifest
    read = decode_manifest(encode_manifest(manifest), BundleManifest, "manifest.json")
    assert read.recipe.list_losses() == complete_losses(losses[0], "scores", None, "labels")
    assert (read.recipe.loss, read.recipe.output) == ("cross-entropy", "scores")


def test_a_recipe_of_an_earlier_version_has_its_one_loss() -> None:
    manifest = cut(build_network(), at=None, loss="mse", labels="target").manifest
    earlier = msgspec.json.decode(encode_manifest(manifest))
    del earlier["recipe"]["losses"], earlier["sha256"]
    read = decode_manifest(msgspec.json.encode(earlier), BundleManifest, "manifest.json")
    assert read.recipe.list_losses() == (Loss(kind="mse", output="scores", labels="target"),)
