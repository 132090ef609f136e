"""The limits of graphs: a model that `cut` accepts stays within those of the graphs cut from it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from splitonnx.graph_limits import MODEL, STAGE
from tests.support.typescript_tables import read_comments, write_tables

BYTES_OF_A_CHARACTER = 4
"""The most that UTF-8 needs."""


def test_every_name_of_a_model_fits_a_stage() -> None:
    assert STAGE.name_bytes >= BYTES_OF_A_CHARACTER * MODEL.name_characters


def test_a_stage_may_have_the_model_s_nodes_and_those_of_their_gradients() -> None:
    assert STAGE.nodes >= 4 * MODEL.nodes
    assert STAGE.names >= STAGE.nodes


def test_tensors_and_texts_have_the_same_limits_in_both() -> None:
    assert (MODEL.rank, MODEL.text_bytes) == (STAGE.rank, STAGE.text_bytes)


def test_nobody_changes_the_limits_of_others() -> None:
    with pytest.raises(FrozenInstanceError):
        STAGE.nodes = 1  # type: ignore[misc]


def test_every_limit_has_its_unit_beside_it() -> None:
    for limits in (MODEL, STAGE):
        own = set(type(limits).__annotations__)
        assert read_comments(type(limits)).keys() == own


@pytest.mark.parametrize("path", write_tables(), ids=lambda path: path.name)
def test_the_table_in_javascript_is_fresh(path: Path) -> None:
    assert path.read_text() == write_tables()[path], (
        "write it again: python -m tests.support.typescript_tables"
    )
