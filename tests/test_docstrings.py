"""The prose of docstrings: how a sample is drawn, and what can be checked without a reader."""

from __future__ import annotations

from pathlib import Path

from tests.support.docstrings import SIZE, draw_sample, list_docstrings

UNCLEAR = ("Give", "Hand", "Let", "Put", "Say", "See to", "Settle", "Take", "Tell", "Whether")
"""How no docstring of a function begins: other verbs are plainer."""


def test_a_sample_holds_as_many_docstrings_as_it_should_and_none_twice() -> None:
    sample = draw_sample(1)
    assert len(set(sample)) == len(sample) == SIZE
    assert set(sample) <= set(list_docstrings())


def test_the_same_seed_draws_the_same_sample_and_another_seed_another() -> None:
    assert draw_sample(1) == draw_sample(1)
    assert draw_sample(1) != draw_sample(2)


def test_public_docstrings_are_found_in_modules_classes_functions_and_methods(
    tmp_path: Path,
) -> None:
    for folder in ("splitonnx", "runtime", "partitioner"):
        (tmp_path / folder).mkdir()
    (tmp_path / "runtime" / "rooms.py").write_text(
        '"""A room."""\n'
        "def enter():\n    '''Enter it.'''\n    def inner(): '''Hidden.'''\n"
        "def _hide(): '''Private.'''\n"
        "def plain(): pass\n"
        "class Room:\n    '''Opens.'''\n    async def open(self): '''Open it.'''\n"
        "    def _lock(self): '''Private.'''\n"
    )
    found = [(one.line, one.name, one.text) for one in list_docstrings(tmp_path)]
    assert found == [
        (1, "(module)", "A room."),
        (2, "enter", "Enter it."),
        (7, "Room", "Opens."),
        (9, "Room.open", "Open it."),
    ]
    assert draw_sample(3, size=2, root=tmp_path) == draw_sample(3, size=2, root=tmp_path)


def test_every_package_is_looked_at() -> None:
    folders = {one.path.split("/")[0] for one in list_docstrings()}
    assert folders == {"splitonnx", "runtime", "partitioner"}
    assert len(list_docstrings()) > 500


def test_no_public_function_s_docstring_begins_with_an_unclear_verb() -> None:
    unclear = [
        f"{one.path}:{one.line} {one.text.splitlines()[0]}"
        for one in list_docstrings()
        if one.is_function and one.text.startswith(tuple(f"{word} " for word in UNCLEAR))
    ]
    assert not unclear, "\n".join(unclear)
