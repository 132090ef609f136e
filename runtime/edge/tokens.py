"""Bearer tokens: authentication of clients, and the owner and roles of each token.

A new token has 256 random bits and is shown once.  The server's file stores only the token's
SHA-256 hash, so that nobody can log in with the contents of the file.  A slow hash, as used for
passwords, is not needed, because the random bits cannot be guessed.  Each line has an owner's name,
a hash and, optionally, roles::

    clinic-a sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 train,publish

A token without roles in the file has all roles but ``fetch``, which has to be named.  An owner may
have several tokens, each with its own roles, so that a token can be replaced without interruption.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from splitonnx.atomic import append_line
from splitonnx.errors import UnusableFile, UsageError
from splitonnx.files import open_regular, read_regular
from splitonnx.outputs import check_place

TOKEN_BYTES = 32
"""Random bytes in a token."""
MAX_FILE = 1 << 20
"""Largest token file in bytes; an entry takes about a hundred."""
ENVIRONMENT = "SPLITONNX_TOKEN"
"""Environment variable from which a client reads its token if no file is given."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_TOKEN = re.compile(r"[\x21-\x7e]{16,512}")

_logger = logging.getLogger("splitonnx.tokens")


class Role(StrEnum):
    """A permission that a token grants its owner on a server."""

    TRAIN = "train"
    """Open sessions: train, predict, and download the client's part."""
    PUBLISH = "publish"
    """Replace the newest state in the server's folder, from which later sessions begin."""
    OPERATE = "operate"
    """Read the metrics, and list all sessions."""
    FETCH = "fetch"
    """Read the trained states of the server's part from sessions of the same owner."""


DEFAULT_ROLES = frozenset({Role.TRAIN, Role.PUBLISH, Role.OPERATE})
"""The roles of a token whose line names none, and of clients of a server without tokens.

``fetch`` is not among them, because the weights of the server's part may be its owner's secret.
"""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A client's owner and roles, which usually come from its token.

    ``owner`` is ``""`` if nothing identifies the client.
    """

    owner: str
    roles: frozenset[Role] = DEFAULT_ROLES


class Tokens:
    """The tokens that a server accepts: the hash of each token, with its owner and roles."""

    def __init__(self, entries: Iterable[tuple[Identity, bytes]]) -> None:
        self._entries = tuple(entries)

    def __len__(self) -> int:
        return len(self._entries)

    @classmethod
    def read(cls, path: str | Path) -> Tokens:
        """Read a server's token file, and warn if other users may read or change it.

        Raises:
            UnusableFile: the file is missing, has an invalid line, or contains no token.
        """
        path = Path(path)
        entries = []
        for number, line in enumerate(_read_lines(path), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                entries.append(_read_entry(line.split(), f"{path}, line {number}"))
        if not entries:
            raise UnusableFile(str(path), "it holds no token; add one with `splitonnx token NAME`")
        warn_if_open(path)
        return cls(entries)

    def find(self, token: str) -> Identity | None:
        """Return the identity that belongs to a token, or ``None`` if the token is unknown.

        Every entry is compared, so that the response time reveals nothing about the tokens.
        """
        shown = _hash(token)
        found = None
        for identity, known in self._entries:
            if hmac.compare_digest(shown, known):
                found = identity
        return found


def add_token(path: str | Path, name: str, roles: Iterable[Role] = ()) -> str:
    """Create a token for ``name``, append its hash to the server's file, and return the token.

    ``name`` is the name of the token's owner.  The token itself is not stored.  If ``roles`` is
    empty, the token has :data:`DEFAULT_ROLES`.

    Raises:
        UsageError: ``name`` is not a valid name.
        UnusableFile: the file cannot be written.
    """
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"'{name}' is not a name for a token's owner; use up to 64 letters, digits, "
            "'.', '_' and '-'"
        )
    token = secrets.token_urlsafe(TOKEN_BYTES)
    words = [name, f"sha256:{_hash(token).hex()}", ",".join(dict.fromkeys(roles))]
    line = " ".join(words).rstrip() + "\n"
    try:
        check_place(Path(path))
        is_new = not os.path.lexists(path)
        if os.path.exists(path):
            os.close(open_regular(path, MAX_FILE))
        try:
            append_line(Path(path), line.encode())
        except OSError:
            if is_new:
                with suppress(OSError):  # the error reports the first failure, not this one
                    os.unlink(path)
            raise
    except OSError as error:
        raise UnusableFile(str(path), error.strerror or str(error)) from error
    return token


def read_token(path: str | Path | None) -> str | None:
    """Read a client's token from a file, or from the environment if ``path`` is ``None``.

    The file must contain nothing but the token.  If the environment variable is not set, the result
    is ``None``.

    Raises:
        UnusableFile: the file is missing, or the file or variable does not contain a valid token.
    """
    if path is None:
        token, source = os.environ.get(ENVIRONMENT), ENVIRONMENT
        if token is None:
            return None
    else:
        path, source = Path(path), str(path)
        token = "\n".join(_read_lines(path))
        warn_if_open(path)
    token = token.strip()
    if _TOKEN.fullmatch(token) is None:
        raise UnusableFile(source, "it holds no token, as `splitonnx token NAME` prints it")
    return token


def warn_if_open(path: Path) -> None:
    """Warn if other users of the machine may read or change a file that contains secrets."""
    if os.name == "posix" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        _logger.warning("others may read %s; run: chmod 600 %s", path, path)


def _read_entry(words: list[str], place: str) -> tuple[Identity, bytes]:
    """Read one line of a server's token file; errors do not quote the line, which may be secret.

    Raises:
        UnusableFile: the line is not a name and a hash, or names an unknown role.
    """
    match = _HASH.fullmatch(words[1]) if len(words) in (2, 3) else None
    if match is None or _NAME.fullmatch(words[0]) is None:
        # the line itself is not shown, because it may contain a token
        reason = "not a name, a hash and perhaps roles; `splitonnx token NAME` writes such lines"
        raise UnusableFile(place, reason)
    try:
        roles = frozenset(map(Role, words[2].split(","))) if len(words) == 3 else DEFAULT_ROLES
    except ValueError as error:
        reason = f"a role that is none; a token's roles are some of {','.join(Role)}"
        raise UnusableFile(place, reason) from error
    return Identity(owner=words[0], roles=roles), bytes.fromhex(match[1])


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _read_lines(path: Path) -> list[str]:
    try:
        return read_regular(path, MAX_FILE).decode("utf-8").splitlines()
    except OSError as error:
        raise UnusableFile(str(path), error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise UnusableFile(str(path), "it is not text") from error
