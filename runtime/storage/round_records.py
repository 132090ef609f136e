"""The records of closed rounds on a server's disk, so that clients get the same tensors again.

A record is a safetensors file in the server's folder::

    <server's folder>/rounds/<number>.safetensors    the newest two rounds

It is written atomically and durably, with a SHA-256 checksum.  Records belong to no owner, so they
do not count towards an owner's quota, and do not expire.  This module handles files; the server's
policy decides what a round joins.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from splitonnx.atomic import clear_unfinished, replace_file
from splitonnx.checksums import encode_with_checksum, has_valid_checksum
from splitonnx.chunks import hold
from splitonnx.codecs import decode_tensors
from splitonnx.errors import BundleError, FormatError
from splitonnx.json_errors import JSON_ERRORS
from splitonnx.states import MAX_HEADER, check_home, map_file

FORMAT = "splitonnx.round/1"
ROUNDS = "rounds"
"""The name of the folder in the server's folder."""
KEPT = 2
"""How many records are kept: the newest may be damaged, and then the one before it is used."""

_FACTS = "splitonnx"
_Count = Annotated[int, msgspec.Meta(ge=0)]
_log = logging.getLogger("splitonnx.server")


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundRecord:
    """A closed round: its number, its joined tensors, and the sessions that belong to it.

    The first round, which is closed before anybody trains, is number 0.
    ``members`` are the sessions that the next round waits for, in their order, and ``holder`` is
    the one whose turn it is if they train one after the other.  ``adoptions`` says for each session
    at which of its steps it received the tensors of which round, newest first.  If all sessions
    train one model, its state is among the tensors, ``version`` is the number of its updates,
    ``owners`` are the sessions' owners, and ``savers`` those whose clients write checkpoints.
    """

    number: int
    tensors: Mapping[str, np.ndarray] = field(repr=False)
    members: tuple[str, ...] = ()
    holder: str = ""
    adoptions: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    version: int = 0
    owners: Mapping[str, str] = field(default_factory=dict)
    savers: tuple[str, ...] = ()


class _Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str
    digest: str
    number: _Count
    members: tuple[str, ...]
    holder: str
    adoptions: dict[str, tuple[tuple[_Count, _Count], ...]]
    version: _Count = 0
    owners: dict[str, str] = {}
    savers: tuple[str, ...] = ()


# msgspec ends the process if two threads use a type for the first time at the same time
_DECODER = msgspec.json.Decoder(_Facts)


class RoundRecords:
    """The records of one bundle's rounds in a server's ``folder``; ``digest`` is the bundle's.

    Not thread-safe.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self._home = folder
        self._folder = folder / ROUNDS
        self._digest = digest

    def write(self, record: RoundRecord) -> None:
        """Write a record, and delete all others but the newest one before it.

        Raises:
            BundleError, NotSaved: it cannot be written.
        """
        facts = _Facts(
            format=FORMAT,
            digest=self._digest,
            number=record.number,
            members=record.members,
            holder=record.holder,
            adoptions=dict(record.adoptions),
            version=record.version,
            owners=dict(record.owners),
            savers=record.savers,
        )
        metadata = {_FACTS: msgspec.json.encode(facts).decode()}
        check_home(self._home, self._digest)
        path = self._name(record.number)
        try:
            self._folder.mkdir(exist_ok=True)
            clear_unfinished(self._folder)
            replace_file(path, encode_with_checksum(record.tensors, metadata))
            older = [number for number in self._list() if number < record.number]
            kept = {record.number, *older[: KEPT - 1]}
            for number in self._list():
                if number not in kept:  # later ones are of an earlier training
                    self._name(number).unlink(missing_ok=True)
        except OSError as error:
            raise BundleError(str(path), f"it cannot be written: {error.strerror}") from error

    def clear(self) -> None:
        """Delete all records, because a new training begins.

        Raises:
            BundleError: a record cannot be deleted.
        """
        try:
            for number in self._list():
                self._name(number).unlink(missing_ok=True)
        except OSError as error:
            reason = f"it cannot be emptied: {error.strerror}"
            raise BundleError(str(self._folder), reason) from error

    def read_newest(self) -> RoundRecord | None:
        """Read the newest record that is whole, or return ``None`` if there is none."""
        return self._read_first(self._list())

    def read_before(self, number: int) -> RoundRecord | None:
        """Read the newest record before a round, or return ``None`` if there is none."""
        return self._read_first([found for found in self._list() if found < number])

    def _read_first(self, numbers: Iterable[int]) -> RoundRecord | None:
        for number in numbers:
            try:
                return self._read(number)
            except (BundleError, FormatError) as error:
                _log.warning("%s; the record before it is used", error)
        return None

    def _read(self, number: int) -> RoundRecord:
        path = self._name(number)
        content = hold(map_file(path))
        tensors, metadata = decode_tensors(content, max_header=MAX_HEADER)
        if not has_valid_checksum(content, metadata):
            raise BundleError(str(path), "it was altered since it was written")
        try:
            facts = _DECODER.decode(metadata.get(_FACTS, ""))
        except JSON_ERRORS as error:
            raise BundleError(str(path), f"it is not the record of a round: {error}") from error
        if (facts.format, facts.digest, facts.number) != (FORMAT, self._digest, number):
            raise BundleError(str(path), "it is the record of another bundle or round")
        return RoundRecord(
            number=number,
            tensors=tensors,
            members=facts.members,
            holder=facts.holder,
            adoptions=facts.adoptions,
            version=facts.version,
            owners=facts.owners,
            savers=facts.savers,
        )

    def _list(self) -> list[int]:
        """Return the numbers of all records, newest first."""
        names = self._folder.glob("*.safetensors") if self._folder.is_dir() else ()
        return sorted((int(path.stem) for path in names if path.stem.isdecimal()), reverse=True)

    def _name(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"
