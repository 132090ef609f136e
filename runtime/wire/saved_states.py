"""The trained state of a session on a server's disk, as ``GET /states/...`` returns it.

A client asks for the description first, and then for the file's bytes, piece by piece.  Both sides
share these values.  Readers ignore fields that a later version adds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import msgspec

PATH = "/states/"
"""How the URL paths of all states begin."""
PIECE_BYTES = 8 << 20
"""Bytes of a piece; the last piece of a file may have fewer."""
DESCRIPTION_BYTES = 4096
"""The most bytes of a description."""
NOT_SAVED = "no finished training of this session is saved here for the owner of this token"
"""The text of the answer about a session without a state, or of another owner."""
SAVED_ANEW = "this state was replaced by a newer one"
"""The text of the answer about a piece of a state that is no longer there."""

_PATH = re.compile(
    re.escape(PATH) + r"([0-9a-f]{32})(?:/([0-9a-f]{64})/(0|[1-9][0-9]{0,15}))?", re.ASCII
)
_Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True, kw_only=True)
class StateQuery:
    """A question about the state of a session.

    Without a ``checksum``, it asks for the description; otherwise for the piece that begins at
    ``offset`` in the file with this checksum.
    """

    session: str
    checksum: str = ""
    offset: int = 0

    @property
    def path(self) -> str:
        """Return the URL path of the question."""
        whole = f"{PATH}{self.session}"
        return f"{whole}/{self.checksum}/{self.offset}" if self.checksum else whole


def read_path(path: str) -> StateQuery | None:
    """Read a question from a URL path, or return ``None`` if the path is another one."""
    found = _PATH.fullmatch(path)
    if found is None:
        return None
    return StateQuery(session=found[1], checksum=found[2] or "", offset=int(found[3] or 0))


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """The description of the state that a session has published as the outcome of its training.

    ``digest`` is the bundle's.  The file has ``nbytes`` bytes, and ``checksum`` is the SHA-256 that
    it contains.
    """

    digest: str
    session: str
    step: _Count
    nbytes: _Count
    checksum: str


# msgspec ends the process if two threads use a type for the first time at the same time
_DECODER = msgspec.json.Decoder(SavedState)


def encode_description(state: SavedState) -> bytes:
    """Return a description as JSON."""
    return msgspec.json.encode(state)


def decode_description(content: bytes) -> SavedState:
    """Read a description from JSON.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError: see ``JSON_ERRORS`` in :mod:`json_errors`.
    """
    return _DECODER.decode(content)
