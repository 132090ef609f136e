"""Who a token or a certificate stands for, and what they may do; values alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What an owner may do with a server."""

    TRAIN = "train"
    """Open sessions: train, predict, and read the client's part."""
    PUBLISH = "publish"
    """Replace the folder's newest state, from which later sessions begin."""
    OPERATE = "operate"
    """Read the metrics."""


ALL_ROLES = frozenset(Role)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """An owner of sessions, ``""`` where nothing says whom a connection belongs to."""

    owner: str
    roles: frozenset[Role] = ALL_ROLES
