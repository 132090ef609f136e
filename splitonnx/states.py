"""The state of a party's tensors on disk: the result of training.

A party's folder holds the newest outcome in ``state.safetensors``.  An older one of another session
moves to ``outcomes/<session>.safetensors`` when it is replaced, so that a server that trains with
many clients keeps the half that belongs to each.  Files are written completely or not at all, and
carries a SHA-256 over all of itself, which is checked when it is read.  This module knows files and
tensors, and neither graphs nor checkpoints.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from splitonnx.atomic import clear_unfinished, replacing, sync_folder, write_file
from splitonnx.checksums import CHECKSUM, encode_with_checksum, has_valid_checksum
from splitonnx.chunks import hold, iter_chunks
from splitonnx.codecs import Chunk, decode_tensors
from splitonnx.errors import (
    ArrayMismatch,
    BundleError,
    FormatError,
    NotSaved,
    StateNotFinite,
    quote,
)
from splitonnx.files import map_regular, read_regular
from splitonnx.manifests import MANIFEST, MAX_MANIFEST, PartyManifest, Role, StateSpec
from splitonnx.tensors import check_array

FORMAT = "splitonnx.state/1"

STATE = "state.safetensors"
OUTCOMES = "outcomes"
"""The folder, within a party's, of what other sessions came to before."""

_SESSION = re.compile(r"[0-9a-f]{32}")
_replacing = threading.Lock()
"""Several sessions of a server may come to their ends at once."""
MAX_HEADER = 64 << 20
"""Bytes; some hundred for each tensor of a model, far more than any has."""


class _Identity(msgspec.Struct, frozen=True, kw_only=True):
    digest: str


# msgspec ends the process where two threads meet a type for the first time at once
_IDENTITY = msgspec.json.Decoder(_Identity)


@dataclass(frozen=True, kw_only=True)
class State:
    """Every tensor of the manifest's state after ``step`` updates.

    ``session`` is whose outcome it is, empty where that is not known, and ``position`` where in
    its data it stands, as the runtime wrote it.  ``owner`` is whom the session belongs to, as a
    server with tokens knows them; empty for a server without.
    """

    tensors: Mapping[str, np.ndarray] = field(repr=False)
    step: int
    session: str = ""
    position: str = ""
    owner: str = ""


def is_session(name: str) -> bool:
    """Return whether a name is a session's, 32 hexadecimal digits, and so safe in a path."""
    return _SESSION.fullmatch(name) is not None


def write_state(path: str | Path, state: State, digest: str) -> None:
    """Write a party's state into its folder ``path`` as the newest outcome, all or nothing.

    ``digest`` is the bundle's.

    Raises:
        BundleError: it cannot be written there, or the session's outcome is another owner's.
    """
    target = Path(path) / STATE
    facts = {
        "format": FORMAT,
        "step": str(state.step),
        "digest": digest,
        "session": state.session,
        "position": state.position,
        "owner": state.owner,
    }
    try:
        with _replacing:
            if read_owner(target.parent, state.session) not in (None, state.owner):
                raise BundleError(str(target), "the session's outcome belongs to another owner")
            chunks = encode_with_checksum(
                state.tensors, {name: fact for name, fact in facts.items() if fact}
            )
            clear_unfinished(target.parent)
            clear_unfinished(target.parent / OUTCOMES)
            _replace_outcome(target, chunks, state.session)
    except OSError as error:
        raise BundleError(str(target), f"it cannot be written: {error.strerror}") from error


def read_state(
    folder: Path, manifest: PartyManifest, session: str = "", *, is_held: bool = False
) -> State | None:
    """Read the outcome of a session from a party's folder, or the newest one; ``None``: no state.

    Tensors are mapped from the file, every byte of which is verified, or in memory if they are to
    be ``is_held``.

    Raises:
        BundleError, FormatError: it cannot be read, or is not what the manifest declares.
    """
    found = _find_outcome(folder, session)
    if found is None:
        return None
    path, content = found[0], hold(found[1]) if is_held else found[1]
    tensors, metadata = decode_state(path, content, manifest.state)
    has_checksum = CHECKSUM in metadata or "format" in metadata  # earlier versions wrote none
    if has_checksum and not has_valid_checksum(content, metadata):
        raise BundleError(str(path), "it was altered since it was written")
    step, digest = metadata.get("step", ""), metadata.get("digest")
    if digest != manifest.digest or not step.isdecimal():
        raise BundleError(str(path), "it is the state of another bundle")
    return State(
        tensors=tensors,
        step=int(step),
        session=metadata.get("session", ""),
        position=metadata.get("position", ""),
        owner=metadata.get("owner", ""),
    )


def read_owner(folder: Path, session: str) -> str | None:
    """Read whose a session's outcome is; ``None`` where a party's folder has none that is whole."""
    try:
        found = _find_outcome(folder, session) if is_session(session) else None
    except BundleError:
        return None
    metadata = {} if found is None else _read_metadata(found[1])
    return metadata.get("owner", "") if metadata.get("session") == session else None


def read_newest(folder: Path) -> dict[str, str]:
    """Read the metadata of a folder's newest outcome; empty where there is none that is whole."""
    try:
        return _read_metadata(_map_present(folder / STATE))
    except BundleError:
        return {}


def list_outcomes(folder: Path) -> dict[str, Path]:
    """Return the file of each session's outcome in a party's folder, but for the newest one's."""
    found = {}
    for path in (folder / OUTCOMES).glob("*.safetensors"):
        if is_session(path.stem):
            found[path.stem] = path
    return found


def check_home(folder: Path, digest: str) -> None:
    """Raise unless ``folder`` still is a party's of the bundle with this digest.

    Raises:
        NotSaved: it was deleted or replaced since it was loaded, and is not made again.
    """
    try:
        content = read_regular(folder / MANIFEST, MAX_MANIFEST)
        found = _IDENTITY.decode(content).digest
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotSaved(str(folder), "the folder's manifest is gone since it was loaded") from error
    if found != digest:
        raise NotSaved(str(folder), "the folder is another bundle's since it was loaded")


def map_file(path: Path) -> memoryview:
    """Map a regular file, read-only; its bytes are read from disk where they are looked at.

    Raises:
        BundleError: it is missing, empty, unreadable, or no regular file.
    """
    try:
        return map_regular(path)
    except OSError as error:
        raise _refuse_file(path, error) from error


def _refuse_file(path: Path, error: OSError) -> BundleError:
    return BundleError(str(path.parent), f"'{path.name}' cannot be read: {error.strerror}")


def decode_state(
    path: Path, content: memoryview, declared: Iterable[StateSpec]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the tensors that ``declared`` lists, as views of ``content``, and the metadata.

    ``path`` is the file that the errors name.

    Raises:
        FormatError: the bytes are not one whole, well-formed tensor file.
        BundleError: a tensor is missing, undeclared, or of another dtype or shape.
    """
    try:
        tensors, metadata = decode_tensors(content, max_header=MAX_HEADER)
    except FormatError as error:
        raise FormatError(str(path), error.reason) from error
    check_state(path, tensors, declared)
    return tensors, metadata


def check_state(
    path: Path, tensors: Mapping[str, np.ndarray], declared: Iterable[StateSpec]
) -> None:
    """Raise unless ``tensors`` are those that ``declared`` lists, of those dtypes and shapes.

    ``path`` is the file that they come from or go to.

    Raises:
        BundleError: they differ.
    """
    specs = {spec.tensor.name: spec.tensor for spec in declared}
    if differing := specs.keys() ^ tensors.keys():
        raise BundleError(str(path), f"it and the manifest differ in {quote(sorted(differing))}")
    try:
        for tensor, spec in specs.items():
            check_array(tensors[tensor], spec, {})
    except ArrayMismatch as error:
        raise BundleError(str(path), str(error)) from error


def check_finite_state(
    path: Path, tensors: Mapping[str, np.ndarray], declared: Iterable[StateSpec]
) -> None:
    """Raise where a tensor that training changes holds NaN or infinity.

    Raises:
        StateNotFinite: one does; what was saved before it is kept.
    """
    for spec in declared:
        array = tensors[spec.tensor.name]
        if spec.role is not Role.FROZEN and not _is_finite(array):
            raise StateNotFinite(str(path), spec.tensor.name)


def _is_finite(array: np.ndarray) -> bool:
    if array.dtype.kind != "f":
        return True
    pieces = iter_chunks(np.ascontiguousarray(array))
    return all(bool(np.isfinite(np.frombuffer(piece, array.dtype)).all()) for piece in pieces)


def _name_outcome(folder: Path, session: str) -> Path:
    return folder / OUTCOMES / f"{session}.safetensors"


def _find_outcome(folder: Path, session: str) -> tuple[Path, memoryview] | None:
    """Map the outcome of a session, or else the newest one.

    While another process publishes, a session's outcome may move between the two names as they
    are looked at one after the other; then they are looked at again.
    """
    newest = folder / STATE
    while True:
        before = _identify(newest)
        content = None if before is None else _map_present(newest)
        if not is_session(session) or _read_metadata(content).get("session") == session:
            return None if content is None else (newest, content)
        kept = _name_outcome(folder, session)
        if (older := _map_present(kept)) is not None:
            return kept, older
        if _identify(newest) == before:
            return None if content is None else (newest, content)


def _identify(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _map_present(path: Path) -> memoryview | None:
    """Map a file if it is there; who asks first and opens then may find it moved in between."""
    try:
        return map_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _refuse_file(path, error) from error


def _read_metadata(content: memoryview | None) -> dict[str, str]:
    """Read a tensor file's metadata; empty where there are none that can be read."""
    if content is None:
        return {}
    try:
        _, metadata = decode_tensors(content, max_header=MAX_HEADER)
    except FormatError:
        return {}
    return metadata


def _replace_outcome(target: Path, chunks: Iterable[Chunk], session: str) -> None:
    with replacing(target) as fresh:
        write_file(fresh, chunks)
        _keep_outcome(target, session)
    if session:  # its older one has no use any more
        _name_outcome(target.parent, session).unlink(missing_ok=True)


def _keep_outcome(target: Path, session: str) -> None:
    """Rename the outcome that is about to be replaced, if it is of another session.

    It is on disk under that name before it is replaced.
    """
    before = _read_session(target)
    if before in ("", session):
        return
    kept = _name_outcome(target.parent, before)
    kept.parent.mkdir(exist_ok=True)
    with replacing(kept) as fresh:
        try:
            os.link(target, fresh)
        except OSError:  # a file system without links
            write_file(fresh, [map_file(target)])
    sync_folder(target.parent)


def _read_session(path: Path) -> str:
    """Read whose outcome a file is; empty where there is none that can be read."""
    session = read_newest(path.parent).get("session", "")
    return session if is_session(session) else ""
