"""A recipe's losses, as bundles of this version and of earlier ones have them."""

from __future__ import annotations

import msgspec

from splitonnx.losses import Loss
from splitonnx.recipes import Recipe

RECIPE = Recipe(
    at=("a",),
    tail_at=(),
    loss="mse",
    output="scores",
    optimizer={"name": "sgd"},
    labels="target",
)


def test_a_loss_without_settings_is_made_of_the_recipe_s_own_fields() -> None:
    assert RECIPE.list_losses() == (Loss(kind="mse", output="scores", labels="target"),)


def test_losses_with_settings_are_kept_as_they_are() -> None:
    losses = (Loss(kind="mse", output="a"), Loss(kind="l1", output="b", weight=2.0))
    assert msgspec.structs.replace(RECIPE, losses=losses).list_losses() == losses


def test_a_recipe_says_nothing_of_codecs_where_there_are_none() -> None:
    assert b"wire" not in msgspec.json.encode(RECIPE)
    coded = msgspec.structs.replace(RECIPE, wire="int8")
    assert msgspec.json.decode(msgspec.json.encode(coded), type=Recipe) == coded


def test_a_recipe_says_who_computes_again_only_where_someone_does() -> None:
    assert b"recompute" not in msgspec.json.encode(RECIPE)
    made = msgspec.structs.replace(RECIPE, recompute=("client",))
    assert msgspec.json.decode(msgspec.json.encode(made), type=Recipe) == made
