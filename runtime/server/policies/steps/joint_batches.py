"""Make one batch of several clients' tensors, and divide what the server computes from it.

The loss of a joint batch is the mean over all its rows, and a client's loss is the mean over the
client's rows.  Gradients are scaled accordingly, so that a client's share of the gradient is what
it would be if the client's loss were weighted by the client's part of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from splitonnx.errors import RemoteProtocolError, UsageError
from splitonnx.manifests import PartyManifest, Wire, WireKind
from splitonnx.names import SERVER, TRAIN

Tensors = Mapping[str, np.ndarray]


class BatchLayout:
    """How the tensors of a bundle's training step are joined along their first dimension.

    Raises:
        UsageError: a tensor that crosses does not have the rows of the batch, and only these, as
            its one free dimension, so that it is not known how to join it; or it is encoded in
            integers, which cannot be scaled.
    """

    def __init__(self, manifest: PartyManifest) -> None:
        _refuse_codes(manifest)
        self._wires = {wire.tensor.name: wire for wire in manifest.phase(TRAIN).wires}
        rows = {wire.tensor.shape[0] for wire in self._wires.values() if _has_rows(wire)}
        for name, wire in self._wires.items():
            is_report = wire.kind is WireKind.REPORT and wire.sender == SERVER
            if not _has_rows(wire) and not (is_report and not wire.tensor.shape):
                raise _refuse(name, wire)
        if len(rows) != 1:
            raise UsageError(
                "the policy 'synchronous' joins the batches of clients, and the tensors that cross "
                f"name their rows differently: {', '.join(sorted(map(str, rows))) or 'not at all'}"
            )

    def count_rows(self, tensors: Tensors) -> int:
        """Return how many rows a client's tensors have.

        Raises:
            RemoteProtocolError: none of them has rows.
        """
        for name, array in tensors.items():
            if name in self._wires and _has_rows(self._wires[name]):
                return int(array.shape[0])
        raise RemoteProtocolError("its first message of a task has no rows")

    def join(self, parts: Sequence[Tensors], rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Return one batch of the tensors of several clients, in the order of the clients.

        ``rows`` are the clients' numbers of rows.
        """
        total = sum(rows)
        return {
            name: np.concatenate([
                self._scale(name, part[name], count, total)
                for part, count in zip(parts, rows, strict=True)
            ])
            for name in parts[0]
        }  # fmt: skip

    def split(self, tensors: Tensors, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Return each client's part of the tensors that were computed from a joint batch."""
        total, ends = sum(rows), np.cumsum(rows)
        parts: list[dict[str, np.ndarray]] = []
        for count, end in zip(rows, ends, strict=True):
            part = {}
            for name, array in tensors.items():
                if _has_rows(self._wires[name]):
                    part[name] = self._scale(name, array[end - count : end], total, count)
                else:
                    part[name] = array
            parts.append(part)
        return parts

    def _scale(self, name: str, array: np.ndarray, count: int, total: int) -> np.ndarray:
        """Return a gradient times ``count / total``, and anything else as it is."""
        if self._wires[name].kind is not WireKind.GRADIENT or count == total:
            return array
        factor = count / total
        return np.asarray(array * np.asarray(factor, dtype=_widen(array.dtype)), dtype=array.dtype)


def _refuse_codes(manifest: PartyManifest) -> None:
    """Check that no tensor is encoded in integers or with scales of a whole batch."""
    phase = manifest.phase(TRAIN)
    floats = {w.tensor.name for w in phase.wires if w.tensor.dtype.startswith("F")}
    for encoded in phase.list_encoded():
        if not floats.issuperset(encoded.wires):
            raise UsageError(
                "the policy 'synchronous' joins the batches of clients, and "
                f"'{encoded.tensor.name}' ({encoded.kind}) is encoded as {encoded.codec}, which "
                "cannot be joined; cut with --wire fp16 or without --wire, or take another policy"
            )


def _has_rows(wire: Wire) -> bool:
    """Return whether a tensor's first dimension is free, and the others are fixed."""
    shape = wire.tensor.shape
    return (
        bool(shape)
        and isinstance(shape[0], str)
        and shape[0].isidentifier()
        and all(isinstance(size, int) for size in shape[1:])
    )


def _widen(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def _refuse(name: str, wire: Wire) -> UsageError:
    shape = ", ".join(map(str, wire.tensor.shape))
    return UsageError(
        f"the policy 'synchronous' joins the batches of clients, and '{name}' ({wire.kind}) of "
        f"shape [{shape}] cannot be joined: only its first dimension may be free, and must be the "
        "rows of the batch; cut elsewhere, fix the other dimensions with --dim, or take another "
        "policy"
    )
