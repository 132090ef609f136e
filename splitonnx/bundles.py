"""Bundles: the folders that a cut model lives in, one complete folder a party; load and save.

Files are written completely or not at all, and what is read is checked against the manifest and
its checksums before anything uses it.  This module knows files, hashes and tensors; it runs no
graph and cannot read one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from splitonnx.atomic import read_steadily, recover, write_file, write_folder
from splitonnx.chunks import hold, iter_chunks
from splitonnx.codecs import Chunk, encode_tensors
from splitonnx.errors import BundleError, FormatError, flatten, quote
from splitonnx.files import read_regular
from splitonnx.manifests import (
    MANIFEST,
    MAX_MANIFEST,
    BundleManifest,
    PartyManifest,
    Role,
    StateSpec,
    decode_manifest,
    encode_manifest,
    has_valid_checksum,
)
from splitonnx.names import CLIENT, SERVER
from splitonnx.outputs import check_place
from splitonnx.states import State, decode_state, map_file, read_state, write_state
from splitonnx.tensors import DTYPES

MODEL = "model.onnx"
_ALTERED = "it was altered since the bundle was written"
_Manifest = TypeVar("_Manifest", PartyManifest, BundleManifest)
MAX_GRAPH = 2**31 - 1
"""Bytes of a graph's file, at which Protocol Buffers end.

The client in JavaScript takes 256 MiB, as a phone must hold a graph twice, as bytes and in ONNX
Runtime.
"""
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class PartyBundle:
    """All that one party needs: its manifest, stage graphs and weights.

    ``graphs`` maps the graph files' names to ONNX models.  ``weights`` are what training starts
    from: parameters, frozen weights and buffers.  ``trained`` is the state after ``step`` updates,
    optimizer included, or ``None`` before the first; ``session`` is the one that trained it, and
    ``position`` where it was in its data, as the runtime wrote it.  ``path`` is the folder, or
    ``None`` for a bundle in memory.  ``owner`` is whose session it was, at a server with tokens.
    Arrays are read-only.
    """

    manifest: PartyManifest
    graphs: Mapping[str, bytes] = field(repr=False)
    weights: Mapping[str, np.ndarray] = field(repr=False)
    trained: Mapping[str, np.ndarray] | None = field(default=None, repr=False)
    step: int = 0
    session: str = ""
    position: str = ""
    owner: str = ""
    path: Path | None = None

    @classmethod
    def load(cls, path: str | Path, *, session: str = "", is_held: bool = False) -> PartyBundle:
        """Read a party's folder; weights are mapped from the file, not read, unless ``is_held``.

        A process that reads a mapped file ends by SIGBUS where somebody has truncated the file.

        ``session`` asks for the state that came out of it, if the folder still has that; the
        newest outcome otherwise.

        Raises:
            BundleError: the folder is missing or incomplete, a graph, the weights or the state
                were altered, or weights or state are not what the manifest declares.
            FormatError: the manifest or a tensor file cannot be read as such.
        """
        folder = Path(path)
        return read_steadily(
            folder, lambda: cls._load(folder, session, is_held), BundleError, FormatError
        )

    @classmethod
    def _load(cls, folder: Path, session: str, is_held: bool) -> PartyBundle:
        manifest = _read_manifest(folder, PartyManifest)
        graphs = _read_graphs(folder, manifest)
        weights = _read_weights(folder / WEIGHTS, manifest, is_held)
        untrained = cls(manifest=manifest, graphs=graphs, weights=weights, path=folder)
        state = read_state(folder, manifest, session, is_held=is_held)
        return untrained if state is None else untrained.with_state(state)

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        beside: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write the party's folder, and files ``beside`` the bundle's own, all or nothing.

        With ``overwrite``, a party's folder at that place is replaced; nothing else ever is.

        Raises:
            BundleError: something is at ``path``, or it cannot be written there.
            FolderInUse: what is to be replaced is served or trained.
        """

        def write(folder: Path) -> None:
            self._write(folder)
            for name, content in (beside or {}).items():
                write_file(folder / name, [content])

        _write_whole(Path(path), write, PartyManifest, overwrite=overwrite)

    def encode(self) -> tuple[bytes, list[Chunk]]:
        """Write the manifest, with the checksum of the weights, and the weights' file."""
        chunks = encode_tensors(self.weights)
        manifest = msgspec.structs.replace(self.manifest, weights=_sum(chunks))
        return encode_manifest(manifest), chunks

    def _write(self, folder: Path) -> None:
        summed = hashlib.sha256()
        write_file(folder / WEIGHTS, _passing(encode_tensors(self.weights), summed.update))
        manifest = msgspec.structs.replace(self.manifest, weights=summed.hexdigest())
        write_file(folder / MANIFEST, [encode_manifest(manifest)])
        for file, graph in self.graphs.items():
            write_file(folder / file, [graph])
        if self.trained is not None:
            state = State(
                tensors=self.trained,
                step=self.step,
                session=self.session,
                position=self.position,
                owner=self.owner,
            )
            write_state(folder, state, self.manifest.digest)

    def with_state(self, state: State) -> PartyBundle:
        """Return the same party with another state."""
        return replace(
            self,
            trained=state.tensors,
            step=state.step,
            session=state.session,
            position=state.position,
            owner=state.owner,
        )

    def state(self) -> dict[str, np.ndarray]:
        """Return the state to continue from: the trained one, else the weights and zeros.

        Every tensor of the manifest's state is in it, in that order, of that dtype and shape.
        """
        if self.trained is not None:
            return {
                spec.tensor.name: self.trained[spec.tensor.name] for spec in self.manifest.state
            }
        return {
            spec.tensor.name: _zeros(spec)
            if spec.role is Role.OPTIMIZER
            else self.weights[spec.tensor.name]
            for spec in self.manifest.state
        }


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A cut model: how it was cut, its parties, and ``skeleton``, the model without its weights."""

    manifest: BundleManifest
    parties: Mapping[str, PartyBundle]
    skeleton: bytes = field(repr=False)

    @property
    def client(self) -> PartyBundle:
        """The client's part."""
        return self.parties[CLIENT]

    @property
    def server(self) -> PartyBundle | None:
        """The server's part; ``None`` where the model was left whole."""
        return self.parties.get(SERVER)

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read a whole bundle: the folder with ``model.onnx`` and a folder for each party.

        Raises:
            BundleError: as :meth:`PartyBundle.load`, or the parties are not of one cut.
            FormatError: a manifest or a tensor file cannot be read as such.
        """
        folder = Path(path)
        return read_steadily(folder, lambda: cls._load(folder), BundleError, FormatError)

    @classmethod
    def _load(cls, folder: Path) -> Bundle:
        manifest = _read_manifest(folder, BundleManifest)
        parties = {name: PartyBundle.load(_inside(folder, name)) for name in manifest.parties}
        trained_in = parties[CLIENT].session if CLIENT in parties else ""
        for name, party in parties.items():
            if party.session != trained_in:  # another client's training ended later
                state = read_state(folder / name, party.manifest, trained_in)
                parties[name] = party if state is None else party.with_state(state)
        for name, party in parties.items():
            if (party.manifest.party, party.manifest.digest) != (name, manifest.digest):
                raise BundleError(str(folder / name), "it belongs to another bundle")
        skeleton = _read(folder, MODEL, MAX_GRAPH)
        if MODEL in manifest.files:  # earlier versions wrote no checksum
            _compare(folder / MODEL, [skeleton], manifest.files[MODEL])
        return cls(manifest=manifest, parties=parties, skeleton=skeleton)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the bundle as a folder, which appears completely or not at all.

        With ``overwrite``, a bundle at that place is replaced; nothing else ever is.

        Raises:
            BundleError: something is at ``path``, or it cannot be written there.
            FolderInUse: what is to be replaced is served or trained.
        """
        _write_whole(Path(path), self._write, BundleManifest, overwrite=overwrite)

    def _write(self, folder: Path) -> None:
        files = {MODEL: _sum([self.skeleton])}
        manifest = msgspec.structs.replace(self.manifest, files=files)
        write_file(folder / MANIFEST, [encode_manifest(manifest)])
        write_file(folder / MODEL, [self.skeleton])
        for name, party in self.parties.items():
            (folder / name).mkdir()
            party._write(folder / name)


def _initial(manifest: PartyManifest) -> tuple[StateSpec, ...]:
    return tuple(spec for spec in manifest.state if spec.role is not Role.OPTIMIZER)


def _zeros(spec: StateSpec) -> np.ndarray:
    shape = tuple(dim for dim in spec.tensor.shape if isinstance(dim, int))
    return np.zeros(shape, DTYPES[spec.tensor.dtype])


def _inside(folder: Path, name: str) -> Path:
    if not name or Path(name).name != name or name == ".." or not name.isprintable():
        reason = f"its manifest names '{flatten(name)}', which is not a plain name"
        raise BundleError(str(folder), reason)
    return folder / name


def _read(folder: Path, name: str, most: int) -> bytes:
    try:
        return read_regular(_inside(folder, name), most)
    except OSError as error:
        raise BundleError(str(folder), f"'{name}' cannot be read: {error.strerror}") from error


def _read_manifest(folder: Path, kind: type[_Manifest]) -> _Manifest:
    content = _read(folder, MANIFEST, MAX_MANIFEST)
    manifest = decode_manifest(content, kind, str(folder / MANIFEST))
    if not has_valid_checksum(content):
        raise BundleError(str(folder / MANIFEST), _ALTERED)
    return manifest


def _read_graphs(folder: Path, manifest: PartyManifest) -> dict[str, bytes]:
    used = {stage.graph for phase in manifest.phases for stage in phase.stages}
    if undeclared := used - manifest.files.keys():
        raise BundleError(str(folder), f"its manifest lacks the file {quote(sorted(undeclared))}")
    graphs = {name: _read(folder, name, MAX_GRAPH) for name in manifest.files}
    for name, graph in graphs.items():
        _compare(folder / name, [graph], manifest.files[name])
    return graphs


def _read_weights(path: Path, manifest: PartyManifest, is_held: bool) -> dict[str, np.ndarray]:
    """Map a party's first weights; they are read through once where there is a checksum."""
    content = hold(map_file(path)) if is_held else map_file(path)
    weights, _ = decode_state(path, content, _initial(manifest))
    if manifest.weights:  # earlier versions wrote none
        _compare(path, [content], manifest.weights)
    return weights


def _compare(path: Path, chunks: Iterable[Chunk], expected: str) -> None:
    if _sum(chunks) != expected:
        raise BundleError(str(path), _ALTERED)


def _sum(chunks: Iterable[Chunk]) -> str:
    found = hashlib.sha256()
    for _ in _passing(chunks, found.update):
        pass
    return found.hexdigest()


def _passing(chunks: Iterable[Chunk], look: Callable[[memoryview], object]) -> Iterator[memoryview]:
    """Yield chunks piece by piece, and let each be looked at on its way."""
    for chunk in chunks:
        for piece in iter_chunks(chunk):
            look(piece)
            yield piece


def _write_whole(
    target: Path,
    write: Callable[[Path], None],
    kind: type[PartyManifest] | type[BundleManifest],
    *,
    overwrite: bool,
) -> None:
    """Create a folder, or replace one of its ``kind``, with what ``write`` puts into it."""
    try:
        check_place(target)
        recover(target)
        if target.exists() and not overwrite:
            raise BundleError(str(target), "it exists already; choose another place or overwrite")
        if target.exists():
            _expect(target, kind)
        write_folder(target, write, MANIFEST)
    except OSError as error:
        raise BundleError(str(target), f"it cannot be written: {error.strerror}") from error


def _expect(folder: Path, kind: type[PartyManifest] | type[BundleManifest]) -> None:
    try:
        content = _read(folder, MANIFEST, MAX_MANIFEST)
        if kind is PartyManifest:
            decode_manifest(content, PartyManifest, str(folder))
        else:
            decode_manifest(content, BundleManifest, str(folder))
    except (BundleError, FormatError) as error:
        raise BundleError(str(folder), "it is not a bundle, so it is not overwritten") from error
