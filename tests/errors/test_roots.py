"""How errors quote names, and text that others wrote."""

from __future__ import annotations

import pytest

import splitonnx.errors
from splitonnx.errors import NotFinite
from splitonnx.errors.roots import (
    SplitonnxError,
    count_some,
    flatten,
    list_some,
    name_tensor,
    quote,
)

KINDS = [
    kind
    for name in splitonnx.errors.__all__
    if isinstance(kind := getattr(splitonnx.errors, name), type)
]


def test_names_stand_in_quotes_between_commas() -> None:
    assert quote(["a", "b"]) == "'a', 'b'"
    assert quote([]) == ""


def test_of_many_names_a_few_are_quoted_and_the_others_counted() -> None:
    assert count_some(["a", "b", "c", "d"]) == "'a', 'b', 'c', 'd'"
    assert count_some(["a", "b", "c", "d", "e"]) == "'a', 'b', 'c' and 2 more"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x", "'x'"),
        ("h@server", "'h' (sent to the server)"),
        ("h@server#int8", "'h' (sent to the server)"),
        ("h@client_grad#scale", "the gradient of 'h'"),
        ("/block/Add_output_0@client", "'/block/Add_output_0' (sent to the client)"),
        ("h@server_grad", "the gradient of 'h'"),
        ("h@client_grad", "the gradient of 'h'"),
        ("table@2", "'table@2'"),
        ("odd\n@server", "'odd?' (sent to the server)"),
    ],
)
def test_a_tensor_that_is_sent_is_named_as_in_the_model(name: str, expected: str) -> None:
    assert name_tensor(name) == expected
    assert str(NotFinite(name, "step 1")).startswith(f"{expected} holds NaN or infinity")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("a\nb\tc", "a?b?c"),
        ("\x1b[2J", "?[2J"),
        ("\u202eevil", "?evil"),
        ("", ""),
    ],
)
def test_what_would_break_a_line_or_a_terminal_becomes_a_question_mark(
    text: str, expected: str
) -> None:
    assert flatten(text) == expected


def test_long_text_is_cut_and_says_so() -> None:
    assert flatten("x" * 300) == "x" * 300
    assert flatten("x" * 301) == "x" * 300 + "..."
    assert flatten("abcdef", most=3) == "abc..."


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_catching_the_root_catches_every_error_raised_on_purpose(kind: type) -> None:
    assert issubclass(kind, SplitonnxError)


def test_of_many_names_the_first_are_listed() -> None:
    assert list_some(["a", "b"]) == "'a', 'b'"
    assert list_some("abcd", most=2) == "'a', 'b', ..."
    assert list_some([]) == "none"
