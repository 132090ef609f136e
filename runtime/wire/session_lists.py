"""The list of a server's sessions, as ``GET /sessions`` returns it and ``sessions`` reads it.

Both sides share these values.  Readers ignore fields that a later version adds.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

PATH = "/sessions"
"""URL path of the list."""
MOST_SESSIONS = 1000
"""The most sessions that an answer lists."""
MOST_OWNER = 100
"""The most characters of an owner's name that an answer contains."""

Activity = Literal["training", "waiting", "predicting", "idle"]
"""What a session is doing.

``training`` means that a step has begun and is not finished, ``waiting`` that the session has
shared and waits for its round or turn, ``predicting`` that another task is open, and ``idle`` that
nothing is, as between two steps.  Later versions may add others.
"""

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class SessionEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A session in a server's memory.

    ``step`` is the client's step, and ``version`` the number of updates of the model that it
    trains.  ``round`` is the newest round whose joined tensors the client has received, or
    ``None``.  ``activity`` is one of :data:`Activity`.  ``steps_behind`` compares with the session
    that is furthest, and ``rounds_behind`` with the newest round; it is ``None`` if the policy has
    no rounds.  ``seconds_since_left`` is ``None`` while the client is connected, and
    ``seconds_since_message`` before its first message.  Bytes are of messages since the session is
    in memory.  ``is_saved`` says whether the client's step can be restored from the disk, or
    nothing has been trained yet.
    """

    session: str
    owner: str
    step: _Count
    version: _Count
    round: _Count | None
    activity: str
    steps_behind: _Count
    rounds_behind: _Count | None
    seconds_since_left: _Seconds | None
    seconds_since_message: _Seconds | None
    bytes_up: _Count
    bytes_down: _Count
    is_saved: bool


class SessionList(msgspec.Struct, frozen=True, kw_only=True):
    """The sessions in a server's memory, in the order in which they came there.

    ``policy`` is the name of the server's policy, and ``rounds`` the number of its newest closed
    round, or ``None`` if it has no rounds.  ``left_out`` counts the sessions that are not listed,
    of which those without a connection come first.
    """

    policy: str
    rounds: _Count | None
    sessions: tuple[SessionEntry, ...]
    left_out: _Count = 0


# msgspec ends the process if two threads use a type for the first time at the same time
_DECODER = msgspec.json.Decoder(SessionList)


def encode_list(found: SessionList) -> bytes:
    """Return a list of sessions as JSON."""
    return msgspec.json.encode(found)


def decode_list(content: bytes) -> SessionList:
    """Read a list of sessions from JSON.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError: see ``JSON_ERRORS`` in :mod:`json_errors`.
    """
    return _DECODER.decode(content)
