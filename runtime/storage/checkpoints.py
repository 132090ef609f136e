"""Checkpoints: a session's complete state on disk, so that training can continue after a failure.

A session's checkpoints are safetensors files in their own folder::

    <party folder>/sessions/<session>/
        <step>.safetensors       the newest checkpoints, two by default
        <step>.best.safetensors  the newest two that training may return to at its end
        stopped.safetensors      the state at a graceful stop, if there was one

Each file is written atomically and durably, and contains a SHA-256 checksum of its content.  A file
is not accepted as a checkpoint if it was truncated, altered or renamed, or if it belongs to another
session or bundle.  This module handles files; the callers decide when to write a checkpoint, and
from which step both parties continue.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from splitonnx.atomic import clear_unfinished, replace_file, sync_folder
from splitonnx.checksums import encode_with_checksum, has_valid_checksum
from splitonnx.chunks import hold
from splitonnx.codecs import decode_tensors
from splitonnx.errors import BundleError, FormatError, NotSaved, UsageError
from splitonnx.json_errors import JSON_ERRORS
from splitonnx.manifests import PartyManifest
from splitonnx.runtime.storage.checkpoint_files import (
    SESSIONS,
    STEP,
    STOPPED,
    is_best,
    list_names,
    name_step,
)
from splitonnx.runtime.storage.positions import DataPosition
from splitonnx.states import (
    MAX_HEADER,
    check_finite_state,
    check_state,
    decode_state,
    is_session,
    map_file,
)

FORMAT = "splitonnx.checkpoint/1"
KEPT = 2
"""How many checkpoints are kept per session.

The parties write their checkpoints one after the other.  So the newest checkpoint may exist on one
side only, and the one before it is needed to continue.
"""

_FACTS = "splitonnx"
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Stamp = tuple[int, int, int]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """Everything that a party needs to continue a session after ``step`` training steps.

    ``tensors`` contains every tensor of the state that the manifest declares, including buffers and
    the optimizer's tensors.  ``owner`` is the session's owner on a server with tokens.
    """

    session: str
    step: int
    tensors: Mapping[str, np.ndarray] = field(repr=False)
    position: DataPosition | None = None
    owner: str = ""


class _Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The metadata in a checkpoint's header."""

    format: str
    party: str
    digest: str
    session: str
    step: _Count
    owner: str
    position: DataPosition | None


# msgspec ends the process if two threads use a type for the first time at the same time
_DECODER = msgspec.json.Decoder(_Facts)


class CheckpointStore:
    """The checkpoints of one session in one party's folder; not thread-safe.

    Writing a checkpoint deletes all checkpoints of later steps.  Such checkpoints exist only if the
    session went back to an earlier step, and are then obsolete.
    """

    def __init__(
        self, folder: Path, manifest: PartyManifest, session: str, *, kept: int = KEPT
    ) -> None:
        """Choose the session's folder inside the party's ``folder``, without creating it.

        Raises:
            UsageError: ``session`` is not 32 lower-case hexadecimal digits.
        """
        if not is_session(session):
            raise UsageError(f"a session is named by 32 hexadecimal digits, not {session[:40]!r}")
        self.session = session
        self.folder = folder / SESSIONS / session
        self._manifest = manifest
        self._kept = kept
        self._settled = False
        self._whole: dict[tuple[str, _Stamp], int] = {}
        self._broken: set[tuple[str, _Stamp]] = set()

    def write(self, checkpoint: Checkpoint, *, keep: bool = False) -> None:
        """Write a checkpoint atomically, then delete those of later steps and the oldest ones.

        The newest ``kept`` checkpoints remain, and the newest ``KEPT`` of those that were written
        with ``keep``.  The state of an earlier graceful stop is deleted.  Once this method returns,
        the checkpoint survives a power failure.

        Raises:
            NotSaved: the checkpoint contains NaN or infinity or cannot be written, or later ones
                cannot be deleted.  A checkpoint that is not written leaves nothing behind.
            BundleError: the tensors do not match the manifest, or the checkpoint belongs to another
                session or owner.
        """
        self._put(checkpoint, name_step(checkpoint.step, keep=keep))
        self.rewind(checkpoint.step)
        if keep:  # it replaces an ordinary one of the same step
            self._discard([self.folder / name_step(checkpoint.step)])
        self._discard(self._find_obsolete())
        self._discard([self.folder / STOPPED])

    def write_stopped(self, checkpoint: Checkpoint) -> None:
        """Write the state at a graceful stop, and replace the state of an earlier stop.

        Raises:
            NotSaved, BundleError: as raised by :meth:`write`.
        """
        self._put(checkpoint, STOPPED)
        self.rewind(checkpoint.step)

    def remove_stopped(self) -> bool:
        """Durably delete the state of an earlier graceful stop; return whether there was one.

        Raises:
            NotSaved: it cannot be deleted.
        """
        try:
            (self.folder / STOPPED).unlink()
            sync_folder(self.folder)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise NotSaved(str(self.folder), error.strerror or str(error)) from error
        return True

    def steps(self) -> tuple[int, ...]:
        """Return the steps of all valid checkpoints, newest first.

        The state saved at a graceful stop counts as a checkpoint.  Invalid checkpoints are skipped,
        and each is logged once.  A valid checkpoint is read again only if its file has changed.

        Raises:
            BundleError: the folder cannot be read.
        """
        found = self._find_steps()
        stopped = self.folder / STOPPED
        if stopped.exists() and (step := self._check(stopped)) is not None:
            found.add(step)
        return tuple(sorted(found, reverse=True))

    def read(self, step: int) -> Checkpoint:
        """Read the checkpoint of a step, and verify every byte of it.

        The tensors are read-only and memory-mapped from the file, in the manifest's order.

        Raises:
            BundleError: there is no checkpoint of that step, or the checkpoint is invalid.
        """
        path = self._locate(step)
        stopped = self.folder / STOPPED
        if stopped.exists() and (not path.exists() or self._check(path) is None):
            path = stopped
        checkpoint = self._read(path)
        if checkpoint.step != step:
            raise BundleError(str(path), f"it is of step {checkpoint.step}, not {step}")
        return checkpoint

    def owners(self) -> set[str]:
        """Return the owners named in the session's checkpoints, without verifying the tensors."""
        found = set()
        for path in self.list_files():
            with contextlib.suppress(BundleError, FormatError, *JSON_ERRORS):
                _, metadata = decode_tensors(map_file(path), max_header=MAX_HEADER)
                found.add(_DECODER.decode(metadata.get(_FACTS, "")).owner)
        return found

    def list_files(self) -> list[Path]:
        """Return the paths of all checkpoints, valid or not."""
        names = list_names(self.folder)
        return [self.folder / name for name in names if name == STOPPED or STEP.fullmatch(name)]

    def estimate_growth(self, nbytes: int) -> int:
        """Estimate how many more bytes the files will occupy after a checkpoint is written.

        ``nbytes`` is the new checkpoint's size; the sizes of replaced checkpoints are subtracted.
        """
        paths = [path for _, path in sorted(self._list_steps(), reverse=True)]
        older = [path for path in paths[self._kept - 1 :] if not is_best(path)]
        return nbytes - sum(path.stat().st_size for path in older if path.exists())

    def rewind(self, step: int) -> None:
        """Delete the checkpoints of later steps, because the session goes back to ``step``.

        Otherwise, they could later be mistaken for checkpoints of the resumed training.

        Raises:
            NotSaved: the deletion cannot be made durable.
        """
        later = [path for number, path in self._list_steps() if number > step]
        stopped = self.folder / STOPPED
        if stopped.exists() and (number := self._check(stopped)) is not None and number > step:
            later.append(stopped)
        if not later:
            return
        self._discard(later)
        try:
            sync_folder(self.folder)
        except OSError as error:
            raise NotSaved(str(self.folder), error.strerror or str(error)) from error

    def remove(self) -> None:
        """Delete the session's checkpoints and its folder.

        The newest checkpoint is deleted last, so an interruption leaves the session usable.
        """
        clear_unfinished(self.folder)
        self._discard(path for _, path in sorted(self._list_steps()))
        self._discard([self.folder / STOPPED])
        self._settled = False
        try:
            self.folder.rmdir()
            sync_folder(self.folder.parent)
        except FileNotFoundError:  # it had no folder
            pass
        except OSError as error:
            _log.warning("%s is left: %s", self.folder, error.strerror)

    def _put(self, checkpoint: Checkpoint, name: str) -> None:
        path = self.folder / name
        if checkpoint.session != self.session:
            raise BundleError(str(path), f"it is for session '{checkpoint.session}'")
        check_state(path, checkpoint.tensors, self._manifest.state)
        check_finite_state(path, checkpoint.tensors, self._manifest.state)
        if self.owners() - {checkpoint.owner}:
            raise BundleError(str(path), "the session's checkpoints belong to another owner")
        chunks = encode_with_checksum(checkpoint.tensors, self._describe(checkpoint))
        try:
            self._settle()
            replace_file(path, chunks)
        except OSError as error:
            raise NotSaved(str(path), error.strerror or str(error)) from error
        self._whole[name, _stamp(path)] = checkpoint.step

    def _settle(self) -> None:
        """Create the folder durably, and delete temporary files that a killed process left."""
        self.folder.parent.mkdir(exist_ok=True)  # never the party's folder, if that was deleted
        self.folder.mkdir(exist_ok=True)
        if not self._settled:  # also if it existed already: its maker may have been killed
            sync_folder(self.folder.parent.parent)
            sync_folder(self.folder.parent)
            self._settled = True
        clear_unfinished(self.folder)

    def _describe(self, checkpoint: Checkpoint) -> dict[str, str]:
        facts = _Facts(
            format=FORMAT,
            party=self._manifest.party,
            digest=self._manifest.digest,
            session=checkpoint.session,
            step=checkpoint.step,
            owner=checkpoint.owner,
            position=checkpoint.position,
        )
        return {_FACTS: msgspec.json.encode(facts).decode()}

    def _read(self, path: Path) -> Checkpoint:
        content = hold(map_file(path))
        try:
            tensors, metadata = decode_state(path, content, self._manifest.state)
            facts = _DECODER.decode(metadata.get(_FACTS, ""))
        except FormatError as error:
            raise BundleError(str(path), error.reason) from error
        except JSON_ERRORS as error:
            raise BundleError(str(path), f"it is not a checkpoint: {error}") from error
        if not has_valid_checksum(content, metadata):
            raise BundleError(str(path), "it was altered since it was written")
        self._check_facts(path, facts)
        return Checkpoint(
            session=facts.session,
            step=facts.step,
            tensors={s.tensor.name: tensors[s.tensor.name] for s in self._manifest.state},
            position=facts.position,
            owner=facts.owner,
        )

    def _check_facts(self, path: Path, facts: _Facts) -> None:
        if facts.format != FORMAT:
            raise BundleError(
                str(path), f"its format is '{facts.format}', this version reads {FORMAT}"
            )
        if (facts.party, facts.digest) != (self._manifest.party, self._manifest.digest):
            raise BundleError(str(path), "it is a checkpoint of another bundle")
        if facts.session != self.session:
            raise BundleError(str(path), f"it is a checkpoint of session '{facts.session}'")
        step = facts.step
        if path.name not in (STOPPED, name_step(step), name_step(step, keep=True)):
            raise BundleError(str(path), f"it is the checkpoint of step {facts.step}")

    def _check(self, path: Path) -> int | None:
        """Return the step of a valid checkpoint; log an invalid checkpoint and return ``None``."""
        try:
            key = path.name, _stamp(path)
        except OSError:
            return None
        if key not in self._whole and key not in self._broken:
            try:
                self._whole[key] = self._read(path).step
            except BundleError as error:
                self._broken.add(key)
                _log.warning("checkpoint left out: %s", error)
        return self._whole.get(key)

    def _locate(self, step: int) -> Path:
        """Return the path of the checkpoint of a step; one to return to is later in the data."""
        best = self.folder / name_step(step, keep=True)
        return best if self._check(best) is not None else self.folder / name_step(step)

    def _find_obsolete(self) -> list[Path]:
        """List the checkpoints that are neither among the newest nor kept to return to."""
        newest = sorted(self._find_steps(), reverse=True)[: self._kept]
        best = [
            step
            for step, path in self._list_steps()
            if is_best(path) and self._check(path) is not None
        ]
        kept = sorted(best, reverse=True)[:KEPT]
        return [
            path
            for step, path in self._list_steps()
            if step < newest[-1] and not (is_best(path) and step in kept)
        ]

    def _find_steps(self) -> set[int]:
        """Return the steps of valid checkpoints."""
        return {step for step, path in self._list_steps() if self._check(path) is not None}

    def _list_steps(self) -> list[tuple[int, Path]]:
        return [
            (int(match[1]), self.folder / name)
            for name in list_names(self.folder)
            if (match := STEP.fullmatch(name))
        ]

    def _discard(self, paths: Iterable[Path]) -> None:
        """Delete files that are not needed; only log files that cannot be deleted."""
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _log.warning("%s is left: %s", path, error.strerror)


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
