"""Tokens: made once, hashed at rest, found again, and never shown by an error."""

from __future__ import annotations

import hmac
import logging
import stat
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from splitonnx.errors import UnusableFile, UsageError
from splitonnx.runtime.edge.tokens import (
    DEFAULT_ROLES,
    ENVIRONMENT,
    Identity,
    Role,
    Tokens,
    add_token,
    read_token,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def find(tokens: Tokens, token: str) -> str | None:
    """Find the owner's name."""
    identity = tokens.find(token)
    return None if identity is None else identity.owner


def test_a_token_is_found_under_its_owner_s_name(file: Path) -> None:
    first, second, other = (add_token(file, name) for name in ("ana", "ana", "ben"))
    known = Tokens.read(file)
    assert len(known) == 3
    assert [find(known, token) for token in (first, second, other)] == ["ana", "ana", "ben"]
    assert len({first, second, other}) == 3


@pytest.mark.parametrize("wrong", ["", " ", "ana", "sha256:", "\ud800", "é" * 1000])
def test_what_is_no_token_is_found_nowhere(file: Path, wrong: str) -> None:
    token = add_token(file, "ana")
    known = Tokens.read(file)
    assert known.find(wrong) is None
    assert find(known, token + wrong) == ("ana" if wrong == "" else None)
    assert known.find(file.read_text().split(":")[1].strip()) is None  # the hash itself


def test_the_file_holds_no_token_and_only_its_owner_may_read_it(file: Path) -> None:
    token = add_token(file, "ana")
    assert token not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_every_entry_is_compared_even_after_one_has_fitted(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, *_ = (add_token(file, name) for name in "abcde")
    compared = []
    really_compare = hmac.compare_digest

    def compare(first: bytes, second: bytes) -> bool:
        compared.append(second)
        return really_compare(first, second)

    known = Tokens.read(file)
    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert find(known, mine) == "a"
    assert len(compared) == 5


def test_comments_and_empty_lines_are_passed_over(file: Path) -> None:
    token = add_token(file, "ana")
    file.write_text(f"# the clinic\n\n{file.read_text()}   # end\n")
    assert find(Tokens.read(file), token) == "ana"


def test_a_line_is_added_whole_behind_one_without_an_end(file: Path) -> None:
    first = add_token(file, "ana")
    file.write_text(file.read_text().rstrip())
    second = add_token(file, "ben")
    assert [find(Tokens.read(file), token) for token in (first, second)] == ["ana", "ben"]


@pytest.mark.parametrize(
    "line",
    ["my-secret-token-in-the-clear", "ana my-secret", "ana sha256:12", "a/b sha256:" + "0" * 64],
)
def test_a_line_that_is_none_is_named_by_number_and_not_shown(file: Path, line: str) -> None:
    file.write_text(f"# first\n{line}\n")
    with pytest.raises(UnusableFile, match="line 2") as caught:
        Tokens.read(file)
    assert line.split()[-1] not in str(caught.value)


def test_files_that_are_missing_or_empty_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnusableFile, match="No such file"):
        Tokens.read(file)
    file.write_text("# nobody yet\n")
    with pytest.raises(UnusableFile, match="holds no token"):
        Tokens.read(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UnusableFile, match="not text"):
        Tokens.read(file)
    with pytest.raises(UnusableFile, match="directory"):
        add_token(tmp_path, "ana")


@pytest.mark.parametrize("name", ["", "a b", "../x", "a\nb", "-x", "x" * 65])
def test_what_is_no_name_gets_no_token(file: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not a name"):
        add_token(file, name)
    assert not file.exists()


def test_a_file_that_others_may_read_is_warned_of(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_token(file, "ana")
    with caplog.at_level(logging.WARNING):
        Tokens.read(file)
        assert caplog.text == ""
        file.chmod(0o644)
        Tokens.read(file)
        assert "chmod 600" in caplog.text


def test_a_client_reads_its_token_from_a_file_or_the_environment(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(ENVIRONMENT, "a-token-of-the-environment")
    assert read_token(None) == "a-token-of-the-environment"
    file.write_text("a-token-of-the-file\n")
    assert read_token(file) == "a-token-of-the-file"


@pytest.mark.parametrize("content", ["", "short", "two words are not one token", "line\nbreak" * 9])
def test_a_client_s_file_that_holds_no_token_is_refused(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(UnusableFile, match="no token") as caught:
        read_token(file)
    assert not content or content not in str(caught.value)


def test_a_token_has_the_roles_of_its_line_and_without_any_all_but_fetch(file: Path) -> None:
    trainer = add_token(file, "ana", [Role.TRAIN])
    both = add_token(file, "ana", [Role.TRAIN, Role.PUBLISH, Role.TRAIN])
    whole = add_token(file, "ana")
    known = Tokens.read(file)
    roles = [identity.roles for t in (trainer, both, whole) if (identity := known.find(t))]
    assert roles == [{Role.TRAIN}, {Role.TRAIN, Role.PUBLISH}, DEFAULT_ROLES]
    assert file.read_text().splitlines()[1].endswith(" train,publish")


@pytest.mark.parametrize("roles", ["fly", "train,", "train,,publish", "Train", "train publish"])
def test_a_role_that_is_none_is_refused_with_its_line(file: Path, roles: str) -> None:
    file.write_text(f"ana sha256:{'0' * 64} {roles}\n")
    with pytest.raises(UnusableFile, match="line 1"):
        Tokens.read(file)


def test_an_owner_may_do_all_but_fetch_unless_its_roles_are_said() -> None:
    assert Identity(owner="ann").roles == DEFAULT_ROLES == frozenset(Role) - {Role.FETCH}
    assert Identity(owner="ann", roles=frozenset({Role.TRAIN})).roles == {Role.TRAIN}


@pytest.mark.parametrize("word", ["train", "publish", "operate", "fetch"])
def test_a_role_is_the_word_that_stands_in_a_file_of_tokens(word: str) -> None:
    assert Role(word) == word


def test_what_is_no_role_is_none() -> None:
    with pytest.raises(ValueError, match="admin"):
        Role("admin")


def test_what_an_owner_may_do_does_not_change() -> None:
    identity = Identity(owner="ann", roles=frozenset({Role.TRAIN}))
    with pytest.raises(FrozenInstanceError):
        identity.roles = DEFAULT_ROLES  # type: ignore[misc]
