"""The state of a party's tensors on disk: what training came to, and how such files are written.

A party's folder holds the newest outcome in ``state.safetensors``.  An older one of another session
moves to ``outcomes/<session>.safetensors`` when it is replaced, so that a server that trains with
many clients keeps the half that belongs to each.  What is written appears whole or not at all.
This module knows files and tensors, and neither graphs nor checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from splitonnx.codecs import Chunk, decode_tensors, encode_tensors
from splitonnx.errors import ArrayMismatch, BundleError, FormatError, quote
from splitonnx.manifests import PartyManifest, StateSpec
from splitonnx.pieces import split_pieces
from splitonnx.tensors import check_array

STATE = "state.safetensors"
OUTCOMES = "outcomes"
"""The folder, within a party's, of what other sessions came to before."""

_SESSION = re.compile(r"[0-9a-f]{32}")
_FRESH = ".fresh."
"""How the name of a file begins while it is being written."""
_replacing = threading.Lock()
"""Several sessions of a server may come to their ends at once."""
_MAX_HEADER = 64 << 20
"""Bytes; some hundred for each tensor of a model, far more than any has."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Every tensor of the manifest's state after ``step`` updates.

    ``session`` is whose outcome it is, empty where that is not known, and ``position`` where in
    its data it stands, as the runtime wrote it.
    """

    tensors: Mapping[str, np.ndarray] = field(repr=False)
    step: int
    session: str = ""
    position: str = ""


def is_session(name: str) -> bool:
    """Whether a name is that of a session, 32 hexadecimal digits, and so safe in a path."""
    return _SESSION.fullmatch(name) is not None


def write_state(path: str | Path, state: State, digest: str) -> None:
    """Write a party's state into its folder ``path`` as the newest outcome, whole or not at all.

    ``digest`` is the bundle's.

    Raises:
        BundleError: it cannot be written there.
    """
    target = Path(path) / STATE
    facts = {
        "step": str(state.step),
        "digest": digest,
        "session": state.session,
        "position": state.position,
    }
    chunks = encode_tensors(state.tensors, {name: fact for name, fact in facts.items() if fact})
    try:
        with _replacing:
            _clear(target.parent, target.parent / OUTCOMES)
            _replace_outcome(target, chunks, state.session)
    except OSError as error:
        raise BundleError(str(target), f"it cannot be written: {error.strerror}") from error


def read_state(folder: Path, manifest: PartyManifest, session: str = "") -> State | None:
    """Read the outcome of a session from a party's folder, or the newest one; ``None``: no state.

    Tensors are mapped from the file.

    Raises:
        BundleError, FormatError: it cannot be read, or is not what the manifest declares.
    """
    path = folder / STATE
    if is_session(session) and _read_session(path) != session:
        kept = _name_outcome(folder, session)
        path = kept if kept.exists() else path
    if not path.exists():
        return None
    tensors, metadata = decode_state(path, map_file(path), manifest.state)
    step, digest = metadata.get("step", ""), metadata.get("digest")
    if digest != manifest.digest or not step.isdecimal():
        raise BundleError(str(path), "it is the state of another bundle")
    return State(
        tensors=tensors,
        step=int(step),
        session=metadata.get("session", ""),
        position=metadata.get("position", ""),
    )


def map_file(path: Path) -> memoryview:
    """Map a file, read-only; its bytes are read from disk where they are looked at.

    Raises:
        BundleError: it is missing, empty or unreadable.
    """
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise BundleError(str(path.parent), f"'{path.name}' cannot be read: {error}") from error


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
        tensors, metadata = decode_tensors(content, max_header=_MAX_HEADER)
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


def write_file(path: Path, chunks: Iterable[Chunk]) -> None:
    """Write chunks to a file and wait until they are on disk; large ones are not copied.

    Raises:
        OSError: it cannot be written; what was written of it stays.
    """
    with path.open("wb") as file:
        for chunk in chunks:
            for piece in split_pieces(chunk):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on disk; Windows cannot be asked to.

    Raises:
        OSError: the folder cannot be opened, or the disk fails.
    """
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems sync no folders
                raise
        finally:
            os.close(handle)


def _name_outcome(folder: Path, session: str) -> Path:
    return folder / OUTCOMES / f"{session}.safetensors"


def _clear(*folders: Path) -> None:
    """Remove what a killed writer left half-written."""
    for folder in folders:
        for path in folder.glob(f"{_FRESH}*.safetensors"):
            path.unlink(missing_ok=True)


def _replace_outcome(target: Path, chunks: Iterable[Chunk], session: str) -> None:
    fresh = target.with_name(_FRESH + target.name)
    try:
        write_file(fresh, chunks)
        _keep_outcome(target, session)
        os.replace(fresh, target)
    finally:
        with contextlib.suppress(OSError):  # the reason why it failed is told, not this
            fresh.unlink(missing_ok=True)
    sync_folder(target.parent)
    if session:  # its older one has no use any more
        _name_outcome(target.parent, session).unlink(missing_ok=True)


def _keep_outcome(target: Path, session: str) -> None:
    """Give the outcome that is about to be replaced a name of its own, if it is of another session.

    It is on disk under that name before it is replaced.
    """
    before = _read_session(target)
    if before in ("", session):
        return
    kept = _name_outcome(target.parent, before)
    fresh = kept.with_name(_FRESH + kept.name)
    kept.parent.mkdir(exist_ok=True)
    try:
        try:
            os.link(target, fresh)
        except OSError:  # a file system without links
            write_file(fresh, [map_file(target)])
        os.replace(fresh, kept)
    finally:
        fresh.unlink(missing_ok=True)  # also where both names were of one file already
    sync_folder(kept.parent)
    sync_folder(target.parent)


def _read_session(path: Path) -> str:
    """Read whose outcome a file is; empty where there is none that can be read."""
    try:
        _, metadata = decode_tensors(map_file(path), max_header=_MAX_HEADER)
    except (BundleError, FormatError):
        return ""
    session = metadata.get("session", "")
    return session if is_session(session) else ""
