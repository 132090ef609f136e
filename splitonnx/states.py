"""Read and write the outcomes of training: the states of a party's tensors after finished runs.

In a party's folder, the newest outcome is in ``state.safetensors``.  Before it is replaced by the
outcome of another session, it is moved to ``outcomes/<session>.safetensors``.  Thus a server that
trains with many clients keeps one outcome per client.  Files are written atomically.  Each file
contains its own SHA-256 checksum, which is verified when the file is read.  This module deals with
files and tensors, not with graphs or checkpoints.
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
from splitonnx.json_errors import JSON_ERRORS
from splitonnx.manifests import MANIFEST, MAX_MANIFEST, PartyManifest, Role, StateSpec
from splitonnx.tensors import check_array

FORMAT = "splitonnx.state/1"

STATE = "state.safetensors"
OUTCOMES = "outcomes"
"""The folder, inside a party's folder, with the outcomes of earlier sessions."""

_SESSION = re.compile(r"[0-9a-f]{32}")
_replacing = threading.Lock()
"""Several sessions of a server may finish at the same time."""
MAX_HEADER = 64 << 20
"""The largest header in bytes.  A tensor needs about a hundred, so any model fits."""


class _Identity(msgspec.Struct, frozen=True, kw_only=True):
    digest: str


# msgspec crashes if two threads use a type for the first time simultaneously
_IDENTITY = msgspec.json.Decoder(_Identity)


@dataclass(frozen=True, kw_only=True)
class State:
    """All tensors of a party's state after ``step`` updates.

    ``session`` is the ID of the session that produced the state, or empty if the ID is unknown.
    ``position`` is the position of that session in the training data, encoded by the runtime.
    ``owner`` is the owner of the session on a server that requires tokens, and empty on other
    servers.
    """

    tensors: Mapping[str, np.ndarray] = field(repr=False)
    step: int
    session: str = ""
    position: str = ""
    owner: str = ""


def is_session(name: str) -> bool:
    """Return whether ``name`` is a valid session ID: 32 hex digits, which are safe in a path."""
    return _SESSION.fullmatch(name) is not None


def write_state(path: str | Path, state: State, digest: str) -> None:
    """Write ``state`` atomically to the party's folder ``path``, as its latest trained state.

    ``digest`` is the digest of the bundle.

    Raises:
        BundleError: the state cannot be written to ``path``, or the state that the session saved
            before belongs to another owner.
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
    """Read the outcome of a session from a party's folder, or the newest outcome.

    The newest outcome is read if ``session`` is empty or is the ID of a session without an outcome
    in the folder.  Return ``None`` if the folder contains no outcome to read.

    ``is_held`` means that the tensors are read into memory; otherwise they are memory-mapped.  The
    file's checksum is verified in both cases; files of earlier versions may have none.

    Raises:
        BundleError, FormatError: the outcome cannot be read, or does not match the manifest.
    """
    found = _find_outcome(folder, session)
    if found is None:
        return None
    return decode_outcome(found[0], hold(found[1]) if is_held else found[1], manifest)


def decode_outcome(path: Path, content: memoryview, manifest: PartyManifest) -> State:
    """Decode and verify the content of an outcome's file; the tensors are views of ``content``.

    ``path`` is the name of the file; it is used in error messages.

    Raises:
        BundleError, FormatError: it is not an outcome, or does not match the manifest.
    """
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
    """Return the owner recorded in a session's saved result, or ``None`` if it cannot be read."""
    try:
        found = _find_outcome(folder, session) if is_session(session) else None
    except BundleError:
        return None
    metadata = {} if found is None else _read_metadata(found[1])
    return metadata.get("owner", "") if metadata.get("session") == session else None


def read_newest(folder: Path) -> dict[str, str]:
    """Return the metadata of a folder's newest outcome.

    The result is empty if the folder has no outcome, or if the outcome cannot be read.
    """
    try:
        return _read_metadata(_map_present(folder / STATE))
    except BundleError:
        return {}


def list_outcomes(folder: Path) -> dict[str, Path]:
    """Map session IDs to the files of the earlier outcomes in a party's folder."""
    found = {}
    for path in (folder / OUTCOMES).glob("*.safetensors"):
        if is_session(path.stem):
            found[path.stem] = path
    return found


def check_home(folder: Path, digest: str) -> None:
    """Check that ``folder`` still belongs to the bundle with the digest ``digest``.

    Raises:
        NotSaved: the folder was deleted or replaced after the bundle was loaded; a deleted folder
            is not created again.
    """
    try:
        content = read_regular(folder / MANIFEST, MAX_MANIFEST)
        found = _IDENTITY.decode(content).digest
    except (OSError, *JSON_ERRORS) as error:
        raise NotSaved(str(folder), "the folder's manifest is gone since it was loaded") from error
    if found != digest:
        raise NotSaved(str(folder), "the folder is another bundle's since it was loaded")


def map_file(path: Path) -> memoryview:
    """Memory-map a regular file read-only; its bytes are read from disk when they are accessed.

    Raises:
        BundleError: the file is missing, empty, unreadable, or not a regular file.
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
    """Decode the tensors and the metadata of a tensor file; the tensors are views of ``content``.

    ``declared`` lists the tensors that the file must contain.  ``path`` is the name of the file; it
    is used in error messages.

    Raises:
        FormatError: ``content`` is not one complete, well-formed tensor file.
        BundleError: a tensor is missing or undeclared, or has the wrong dtype or shape.
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
    """Check that ``tensors`` are exactly those in ``declared``, with the same dtypes and shapes.

    ``path`` is the file that the tensors are read from or written to.

    Raises:
        BundleError: a tensor is missing or undeclared, or has the wrong dtype or shape.
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
    """Check that the tensors changed by training are free of NaN and infinity.

    Raises:
        StateNotFinite: a tensor contains NaN or infinity; earlier checkpoints are kept.
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
    """Map the outcome of a session, or the newest outcome if the session has none.

    Another process may move the session's outcome from one name to the other between the two
    lookups.  If the newest outcome has changed meanwhile, both lookups are repeated.
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
    """Map a file, or return ``None`` if it does not exist.

    A separate check before opening the file could be wrong if the file is moved in between.
    """
    try:
        return map_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _refuse_file(path, error) from error


def _read_metadata(content: memoryview | None) -> dict[str, str]:
    """Read a tensor file's metadata; return an empty dictionary if the file cannot be decoded."""
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
    if session:  # its older outcome is no longer needed
        _name_outcome(target.parent, session).unlink(missing_ok=True)


def _keep_outcome(target: Path, session: str) -> None:
    """Keep the outcome that is about to be replaced, if another session produced it.

    It is renamed, and is on disk under its new name before the replacement.
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
    """Return the session of an outcome file, or an empty string if it cannot be read."""
    session = read_newest(path.parent).get("session", "")
    return session if is_session(session) else ""
