"""Whom a token or a certificate stands for."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from splitonnx.runtime.edge.identities import ALL_ROLES, Identity, Role


def test_an_owner_may_do_everything_unless_its_roles_are_said() -> None:
    assert Identity(owner="ann").roles == ALL_ROLES == frozenset(Role)
    assert Identity(owner="ann", roles=frozenset({Role.TRAIN})).roles == {Role.TRAIN}


@pytest.mark.parametrize("word", ["train", "publish", "operate"])
def test_a_role_is_the_word_that_stands_in_a_file_of_tokens(word: str) -> None:
    assert Role(word) == word


def test_what_is_no_role_is_none() -> None:
    with pytest.raises(ValueError, match="admin"):
        Role("admin")


def test_what_an_owner_may_do_does_not_change() -> None:
    identity = Identity(owner="ann", roles=frozenset({Role.TRAIN}))
    with pytest.raises(FrozenInstanceError):
        identity.roles = ALL_ROLES  # type: ignore[misc]
