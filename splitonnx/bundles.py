"""Load and save bundles: folders that contain a cut model, with one subfolder per party.

A party is the client or the server.  Each party's folder contains everything that the party needs.
Folders are written atomically.  All content that is read is checked against the manifest and its
checksums before it is used.  This module handles files, hashes and tensors; it neither decodes nor
runs graphs.
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
from splitonnx.errors import BundleError, BundleMismatch, FormatError, flatten, quote
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
"""The largest graph file in bytes, which is the limit of Protocol Buffers.

The JavaScript client accepts 256 MiB, because a phone must hold a graph twice: as bytes and in ONNX
Runtime.
"""
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class PartyBundle:
    """Everything that one party needs: its manifest, its graphs and its weights.

    ``graphs`` maps the names of graph files to serialized ONNX models.  ``weights`` are the tensors
    that training starts from: parameters, frozen weights and buffers.  ``trained`` is the state
    after ``step`` updates, including the optimizer's state, or ``None`` before the first update.
    ``session`` is the ID of the training session that produced ``trained``.  ``position`` is the
    position of that session in the training data, encoded by the runtime.  ``owner`` is the owner
    of the session on a server that requires tokens.  ``path`` is the folder, or ``None`` for a
    bundle in memory.  The arrays are read-only.
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
        """Read a party's folder.

        ``is_held`` means that the weights are read into memory; otherwise they are memory-mapped.
        If another program truncates a mapped file, a process that reads it is killed by SIGBUS.

        ``session`` is the ID of a training session.  If the folder contains the state produced by
        that session, this state is read; otherwise the newest state is read.

        Raises:
            BundleError: the folder is missing or incomplete, a file was altered, or the weights or
                the state do not match the manifest.
            FormatError: the manifest or a tensor file cannot be decoded.
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
        """Write the party's folder atomically.

        ``beside`` contains additional files to write to the same folder: it maps their names to
        their content.  ``overwrite`` permits replacing an existing party folder, but not any other
        file or folder.

        Raises:
            BundleError: ``path`` exists already, or the folder cannot be written there.
            FolderInUse: the folder to replace is being served or trained.
        """

        def write(folder: Path) -> None:
            self._write(folder)
            for name, content in (beside or {}).items():
                write_file(folder / name, [content])

        _write_whole(Path(path), write, PartyManifest, overwrite=overwrite)

    def encode(self) -> tuple[bytes, list[Chunk]]:
        """Return the encoded manifest, and the content of the weights file as a list of chunks.

        The manifest includes the checksum of the weights file.
        """
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
        """Return a copy of this party with ``state`` as its trained state."""
        return replace(
            self,
            trained=state.tensors,
            step=state.step,
            session=state.session,
            position=state.position,
            owner=state.owner,
        )

    def state(self) -> dict[str, np.ndarray]:
        """Return the tensors from which training continues.

        After the first update, these are the trained tensors.  Before it, they are the initial
        weights and, for the optimizer's state, zeros.  The result contains every tensor of the
        manifest's state, in the same order and with the declared dtype and shape.
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
    """A cut model: a manifest that describes the cut, and one part per party.

    ``parties`` maps the name of each party to its part.  ``skeleton`` is the uncut model without
    its trainable weights, serialized as ONNX.
    """

    manifest: BundleManifest
    parties: Mapping[str, PartyBundle]
    skeleton: bytes = field(repr=False)

    @property
    def client(self) -> PartyBundle:
        """Return the client's part."""
        return self.parties[CLIENT]

    @property
    def server(self) -> PartyBundle | None:
        """Return the server's part, or ``None`` if the model was not cut."""
        return self.parties.get(SERVER)

    def check_steps(self) -> None:
        """Check that both parties are at the same step and were trained in the same session.

        Raises:
            BundleMismatch: the parties are at different steps, or not from the same session.
        """
        client, server = self.client, self.server
        if server is not None and client.step != server.step:
            raise BundleMismatch("the number of steps trained", _step(client), _step(server))
        if server is not None and client.session and server.session not in ("", client.session):
            raise BundleMismatch("the session that trained them", client.session, server.session)

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read a complete bundle: the folder with ``model.onnx`` and one subfolder per party.

        Raises:
            BundleError: a file or folder is not usable (see :meth:`PartyBundle.load`), or the
                parties come from different cuts.
            FormatError: a manifest or a tensor file cannot be decoded.
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
        """Write the bundle's folder atomically.

        ``overwrite`` permits replacing an existing bundle, but not any other file or folder.

        Raises:
            BundleError: ``path`` exists already, or the bundle cannot be written there.
            FolderInUse: the bundle to replace is being served or trained.
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


def compute_digest(parties: Mapping[str, PartyBundle]) -> str:
    """Hash everything that the parties must agree on: the manifests and the weights.

    The manifests contain the hashes of the graphs, and not yet the digest.
    """
    total = hashlib.sha256()
    for name in sorted(parties):
        total.update(encode_manifest(parties[name].manifest))
        for weight, array in parties[name].weights.items():
            total.update(weight.encode() + b"\0")
            for piece in iter_chunks(array):
                total.update(piece)
    return total.hexdigest()


def _step(party: PartyBundle) -> str:
    return f"{party.step} ({party.manifest.party})"


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
        if folder.is_file():
            raise BundleError(
                str(folder),
                "it is a file, but a bundle is a folder, as `splitonnx cut MODEL -o FOLDER` writes "
                "it; name such a folder, or cut the model first",
            ) from error
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
    """Map a party's initial weights, and verify their checksum if the manifest contains it."""
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
    """Yield chunks piece by piece, and call ``look`` with each piece first."""
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
    """Create a folder with the content from ``write``, or replace a folder of the same ``kind``."""
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
