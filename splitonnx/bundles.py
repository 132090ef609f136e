"""Bundles: the folders that a cut model lives in, one complete folder a party; load and save.

What is written appears whole or not at all, and what is read is checked against the manifest
before anything uses it.  This module knows files, hashes and tensors; it runs no graph and cannot
read one.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from splitonnx.codecs import Chunk, decode_tensors, encode_tensors
from splitonnx.errors import ArrayMismatch, BundleError, FormatError, flatten, quote
from splitonnx.manifests import (
    BundleManifest,
    PartyManifest,
    Role,
    StateSpec,
    decode_manifest,
    encode_manifest,
)
from splitonnx.pieces import split_pieces
from splitonnx.tensors import DTYPES, check_array

MANIFEST = "manifest.json"
MODEL = "model.onnx"
WEIGHTS = "weights.safetensors"
STATE = "state.safetensors"

_MAX_HEADER = 64 << 20
"""Bytes; some hundred for each tensor of a model, far more than any has."""


@dataclass(frozen=True, kw_only=True)
class PartyBundle:
    """All that one party needs: its manifest, stage graphs and weights.

    ``graphs`` maps the graph files' names to ONNX models.  ``weights`` are what training starts
    from: parameters, frozen weights and buffers.  ``trained`` is the state after ``step`` updates,
    optimizer included, or ``None`` before the first; ``session`` is the one that trained it, and
    ``position`` where it stood in its data, as the runtime wrote it.  ``path`` is the folder, or
    ``None`` for a bundle in memory.  Arrays are read-only.
    """

    manifest: PartyManifest
    graphs: Mapping[str, bytes] = field(repr=False)
    weights: Mapping[str, np.ndarray] = field(repr=False)
    trained: Mapping[str, np.ndarray] | None = field(default=None, repr=False)
    step: int = 0
    session: str = ""
    position: str = ""
    path: Path | None = None

    @classmethod
    def load(cls, path: str | Path) -> PartyBundle:
        """Read a party's folder; weights are mapped from the file, not read.

        Raises:
            BundleError: the folder is missing or incomplete, a graph was altered, or weights or
                state are not what the manifest declares.
            FormatError: the manifest or a tensor file cannot be read as such.
        """
        folder = Path(path)
        content = _read(folder, MANIFEST)
        manifest = decode_manifest(content, PartyManifest, str(folder / MANIFEST))
        graphs = _read_graphs(folder, manifest)
        weights, _ = _read_tensors(folder / WEIGHTS, _initial(manifest))
        if not (folder / STATE).exists():
            return cls(manifest=manifest, graphs=graphs, weights=weights, path=folder)
        trained, metadata = _read_tensors(folder / STATE, manifest.state)
        step, digest = metadata.get("step", ""), metadata.get("digest")
        if digest != manifest.digest or not step.isdecimal():
            raise BundleError(str(folder / STATE), "it is the state of another bundle")
        return cls(
            manifest=manifest,
            graphs=graphs,
            weights=weights,
            trained=trained,
            step=int(step),
            session=metadata.get("session", ""),
            position=metadata.get("position", ""),
            path=folder,
        )

    def state(self) -> dict[str, np.ndarray]:
        """Return the state to go on from: the trained one, else the weights and zeros.

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
        return self.parties["client"]

    @property
    def server(self) -> PartyBundle | None:
        """The server's part; ``None`` where the model was left whole."""
        return self.parties.get("server")

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read a whole bundle: the folder with ``model.onnx`` and a folder for each party.

        Raises:
            BundleError: as :meth:`PartyBundle.load`, or the parties are not of one cut.
            FormatError: a manifest or a tensor file cannot be read as such.
        """
        folder = Path(path)
        content = _read(folder, MANIFEST)
        manifest = decode_manifest(content, BundleManifest, str(folder / MANIFEST))
        parties = {name: PartyBundle.load(_inside(folder, name)) for name in manifest.parties}
        for name, party in parties.items():
            if (party.manifest.party, party.manifest.digest) != (name, manifest.digest):
                raise BundleError(str(folder / name), "it belongs to another bundle")
        return cls(manifest=manifest, parties=parties, skeleton=_read(folder, MODEL))

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the bundle as a folder, which appears whole or not at all.

        With ``overwrite``, a bundle that stands there is replaced; nothing else ever is.

        Raises:
            BundleError: something stands at ``path``, or it cannot be written there.
        """
        target = Path(path)
        if target.exists() and not overwrite:
            raise BundleError(str(target), "it exists already; choose another place or overwrite")
        if target.exists():
            _expect_bundle(target)
        try:
            self._write_whole(target)
        except OSError as error:
            raise BundleError(str(target), f"it cannot be written: {error.strerror}") from error

    def _write_whole(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            fresh, old = Path(scratch, "fresh"), Path(scratch, "old")
            fresh.mkdir()
            self._write(fresh)
            if target.exists():
                os.rename(target, old)
            try:
                os.rename(fresh, target)
            except OSError:
                if old.exists():
                    os.rename(old, target)
                raise

    def _write(self, folder: Path) -> None:
        write_file(folder / MANIFEST, [encode_manifest(self.manifest)])
        write_file(folder / MODEL, [self.skeleton])
        for name, party in self.parties.items():
            (folder / name).mkdir()
            write_file(folder / name / MANIFEST, [encode_manifest(party.manifest)])
            for file, graph in party.graphs.items():
                write_file(folder / name / file, [graph])
            write_file(folder / name / WEIGHTS, encode_tensors(party.weights))
            if party.trained is not None:
                write_state(
                    folder / name,
                    party.trained,
                    party.step,
                    party.manifest.digest,
                    session=party.session,
                    position=party.position,
                )


def write_state(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    step: int,
    digest: str,
    *,
    session: str = "",
    position: str = "",
) -> None:
    """Write a party's state into its folder ``path``, whole or not at all.

    ``tensors`` is everything the manifest's state lists; ``step`` the number of updates so far;
    ``digest`` the bundle's; ``session`` and ``position`` as :class:`PartyBundle` has them.

    Raises:
        BundleError: it cannot be written there.
    """
    target = Path(path) / STATE
    fresh = target.with_name(f".{STATE}.{os.getpid()}")
    try:
        try:
            facts = {"step": str(step), "digest": digest, "session": session, "position": position}
            written = {name: fact for name, fact in facts.items() if fact}
            write_file(fresh, encode_tensors(tensors, written))
            os.replace(fresh, target)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise BundleError(str(target), f"it cannot be written: {error.strerror}") from error


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


def _read(folder: Path, name: str) -> bytes:
    try:
        return _inside(folder, name).read_bytes()
    except OSError as error:
        raise BundleError(str(folder), f"'{name}' cannot be read: {error.strerror}") from error


def _read_graphs(folder: Path, manifest: PartyManifest) -> dict[str, bytes]:
    used = {stage.graph for phase in manifest.phases for stage in phase.stages}
    if undeclared := used - manifest.files.keys():
        raise BundleError(str(folder), f"its manifest lacks the file {quote(sorted(undeclared))}")
    graphs = {name: _read(folder, name) for name in manifest.files}
    for name, graph in graphs.items():
        if hashlib.sha256(graph).hexdigest() != manifest.files[name]:
            raise BundleError(str(folder / name), "it was altered since the bundle was written")
    return graphs


def _read_tensors(
    path: Path, declared: Iterable[StateSpec]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    return decode_state(path, map_file(path), declared)


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


def _expect_bundle(folder: Path) -> None:
    try:
        decode_manifest(_read(folder, MANIFEST), BundleManifest, str(folder))
    except (BundleError, FormatError) as error:
        raise BundleError(str(folder), "it is no bundle, so it is not overwritten") from error
