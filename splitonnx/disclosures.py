"""List the tensors that a manifest lets one party send to the other, and say so in plain words.

A party sends the tensors that its manifest declares and no others: the engine takes only these from
the stages, and the protocol accepts only these.  The sizes of a step follow from the size of its
batch, where no other dimension is symbolic.  Headers of messages are not counted: they name the
session, the phase, the step, the seed and the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from splitonnx.expressions import evaluate, is_name
from splitonnx.manifests import PartyManifest, Phase, Wire, WireKind
from splitonnx.names import CLIENT, EVALUATE, PREDICT, SERVER, TRAIN
from splitonnx.tensors import DTYPES, TensorSpec

LABELS, RAW_INPUT = "labels", "raw input"
"""The words for the two kinds of data that leave only when a user names them."""
_WORDS: Mapping[WireKind, str] = {
    WireKind.ACTIVATION: "activation",
    WireKind.GRADIENT: "gradient",
    WireKind.INPUT: RAW_INPUT,
    WireKind.OUTPUT: "output",
    WireKind.REPORT: "result",
    WireKind.NORM: "vector of squared gradient norms",
}


@dataclass(frozen=True, kw_only=True)
class SentTensor:
    """A tensor that is sent once in each step of a phase.

    ``wire`` is its name in messages, and ``tensor`` its name in the model.  ``kind`` is what it is,
    in words.  ``declared`` is its type and shape, with the sizes that are known.  ``bytes`` is the
    size of its values, and ``bytes_per_sample`` that of each sample's values; they are ``None``
    where a dimension is not known.
    """

    wire: str
    tensor: str
    kind: str
    declared: str
    bytes: int | None
    bytes_per_sample: int | None

    def __str__(self) -> str:
        size = ""
        if self.bytes is not None:
            size = f" ({self.bytes:,} bytes)"
        elif self.bytes_per_sample is not None:
            size = f" ({self.bytes_per_sample:,} bytes a sample)"
        return f"{self.name} {self.declared}{size}"

    @property
    def name(self) -> str:
        """Return what the tensor is and its name, such as ``activation 'relu1'``."""
        if self.kind in (LABELS, _WORDS[WireKind.NORM]):
            return self.kind
        link = " of" if self.kind == _WORDS[WireKind.GRADIENT] else ""
        return f"{self.kind}{link} '{self.tensor}'"


@dataclass(frozen=True, kw_only=True)
class Sending:
    """What one party sends in each step of a phase; ``batch`` is the size of the step's batch."""

    phase: str
    batch: int | None
    tensors: tuple[SentTensor, ...]

    @property
    def bytes(self) -> int | None:
        """Return the bytes of all tensors together, or ``None`` if one is not known."""
        sizes = [tensor.bytes for tensor in self.tensors]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def __str__(self) -> str:
        return ", ".join(map(str, self.tensors)) or "nothing"


def list_sent(
    manifest: PartyManifest, phase: str, sender: str = CLIENT, batch: int | None = None
) -> Sending:
    """List what ``sender`` sends in each step of a phase with ``batch`` samples.

    Either party's manifest gives the same list.
    """
    part = manifest.phase(phase)
    rows = _name_rows(manifest, part)
    labels = find_labels(manifest)
    wires = [wire for wire in part.wires if wire.sender == sender]
    return Sending(
        phase=phase,
        batch=batch,
        tensors=tuple(_describe(wire, labels, rows, batch) for wire in wires),
    )


def find_labels(manifest: PartyManifest) -> str | None:
    """Return the name of the array that holds the labels, or ``None`` if the loss reads none.

    A server's manifest does not list arrays.  It knows labels only if they are sent to it: these
    are then the one input that leaves to train and not to predict.
    """
    measured = manifest.phase(EVALUATE)
    predicted = manifest.phase(PREDICT).results
    known = [spec.name for spec in measured.data if spec.name not in predicted]
    sent = _list_inputs(manifest, TRAIN) - _list_inputs(manifest, PREDICT)
    return next(iter((*known, *sorted(sent))), None)


def find_batch(manifest: PartyManifest) -> int | None:
    """Return the size of batch that the model fixes, or ``None`` if any size will do."""
    fixed = {spec.shape[0] for spec in _list_rows(manifest, manifest.phase(TRAIN))}
    size = next(iter(fixed), None)
    return size if len(fixed) == 1 and isinstance(size, int) else None


def describe_step(sending: Sending) -> str:
    """Describe in one line what leaves the client in each step of a phase."""
    rows = "" if sending.batch is None else f" of {sending.batch:,}"
    unit = "step" if sending.phase == TRAIN else f"batch to {sending.phase}"
    return f"leaves the client per {unit}{rows}: {sending}"


def count_run(
    manifest: PartyManifest, phase: str, *, samples: int, batch: int, passes: int
) -> tuple[int, int | None]:
    """Count the steps of ``passes`` over the data, and the bytes that the client sends in them.

    The bytes are ``None`` if they are not known.  A smaller last batch is left out where the model
    fixes the size of the batch.
    """
    steps, rest = divmod(samples, batch)
    full = list_sent(manifest, phase, CLIENT, batch).bytes
    if not rest or (phase == TRAIN and find_batch(manifest) is not None):
        return passes * steps, None if full is None else passes * steps * full
    last = list_sent(manifest, phase, CLIENT, rest).bytes
    known = full is not None and last is not None
    total = passes * (steps * (full or 0) + (last or 0)) if known else None
    return passes * (steps + 1), total


def _describe(wire: Wire, labels: str | None, rows: str | None, batch: int | None) -> SentTensor:
    tensor = _strip_port(wire)
    sizes = {rows: batch} if rows is not None and batch is not None else {}
    one, two = (_count_bytes(wire.tensor, {rows: size} if rows else {}) for size in (1, 2))
    is_proportional = one is not None and two == 2 * one
    declared = msgspec.structs.replace(
        wire.tensor, shape=tuple(_fill_in(dim, sizes) for dim in wire.tensor.shape)
    )
    is_labels = wire.kind is WireKind.INPUT and tensor == labels
    return SentTensor(
        wire=wire.tensor.name,
        tensor=tensor,
        kind=LABELS if is_labels else _WORDS[wire.kind],
        declared=str(declared),
        bytes=_count_bytes(wire.tensor, sizes),
        bytes_per_sample=one if is_proportional else None,
    )


def _count_bytes(spec: TensorSpec, sizes: Mapping[str, int]) -> int | None:
    dims = [_fill_in(dim, sizes) for dim in spec.shape]
    numbers = [dim for dim in dims if isinstance(dim, int)]
    dtype = DTYPES.get(spec.dtype)  # a manifest of somebody else's may declare any
    if dtype is None or len(numbers) < len(dims):
        return None
    return dtype.itemsize * math.prod(numbers)


def _strip_port(wire: Wire) -> str:
    """Return the name that the model has for a tensor, without what marks its way."""
    name = wire.tensor.name
    back = CLIENT if wire.receiver == SERVER else SERVER
    if wire.kind is WireKind.GRADIENT:
        return name.removesuffix(f"@{back}_grad")
    return name.removesuffix(f"@{wire.receiver}")


def _fill_in(dim: int | str | None, sizes: Mapping[str, int]) -> int | str | None:
    if not isinstance(dim, str):
        return dim
    size = evaluate(dim, sizes)
    return dim if size is None else size


def _name_rows(manifest: PartyManifest, phase: Phase) -> str | None:
    """Return the one name that stands for the number of rows of a step, if there is one."""
    rows = {spec.shape[0] for spec in _list_rows(manifest, phase)}
    name = next(iter(rows), None)
    return name if len(rows) == 1 and isinstance(name, str) and is_name(name) else None


def _list_rows(manifest: PartyManifest, phase: Phase) -> Iterable[TensorSpec]:
    """List the declarations whose first dimension counts the samples of a step."""
    sent = [w.tensor for w in phase.wires if w.sender == CLIENT and w.kind is not WireKind.NORM]
    declared = phase.data if manifest.party == CLIENT else sent
    return [spec for spec in declared if spec.shape]


def _list_inputs(manifest: PartyManifest, phase: str) -> set[str]:
    wires = manifest.phase(phase).wires
    return {_strip_port(w) for w in wires if w.sender == CLIENT and w.kind is WireKind.INPUT}
