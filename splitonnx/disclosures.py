"""List the tensors that one party may send to the other, and describe them in plain words.

A party sends only the tensors that its manifest declares: no other stage output is put into a
message, and the other party rejects any other tensor.  If the batch size is the only symbolic
dimension, it determines how many bytes are sent per step.  Message headers are not counted; they
contain, for example, the session, the phase, the step, the seed and the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from splitonnx.errors import quote
from splitonnx.expressions import describe_size, evaluate, find_unbound, is_name, solve_for
from splitonnx.manifests import Encoded, PartyManifest, Phase, Wire, WireKind
from splitonnx.names import CLIENT, EVALUATE, JOINED, OWN, PREDICT, SERVER, TRAIN
from splitonnx.tensors import DTYPES, TensorSpec

LABELS, RAW_INPUT = "labels", "raw input"
"""The names of the two kinds of data that leave the client only if the user permits it."""
_WORDS: Mapping[WireKind, str] = {
    WireKind.ACTIVATION: "activation",
    WireKind.GRADIENT: "gradient",
    WireKind.INPUT: RAW_INPUT,
    WireKind.OUTPUT: "output",
    WireKind.REPORT: "result",
    WireKind.NORM: "vector of squared gradient norms",
    WireKind.PARAMETER: "parameter",
    WireKind.COUNT: "count",
}

_WITHOUT_ROWS = (WireKind.NORM, WireKind.PARAMETER, WireKind.COUNT)
"""The kinds of tensors whose first dimension does not count samples."""


@dataclass(frozen=True, kw_only=True)
class SentTensor:
    """A tensor that is sent once in each step of a phase.

    ``wire`` is its name in messages, and ``tensor`` is its name in the model.  ``kind`` describes
    it in words, such as ``activation``.  ``declared`` is its type and shape, with all known sizes
    filled in, and its codec if it is encoded; several tensors may then be sent for it, of which
    ``wire`` names the first.  ``bytes`` is the total size of what is sent for it, or ``None`` if a
    dimension is unknown.  ``bytes_per_sample`` is the size per sample, or ``None`` if the size is
    not proportional to the number of samples, but for the ``bytes_fixed`` of a codec's scales.
    ``tells_labels`` means that the tensor is a gradient from which the server can compute the
    labels; bundles of earlier versions do not say so.
    """

    wire: str
    tensor: str
    kind: str
    declared: str
    bytes: int | None
    bytes_per_sample: int | None
    tells_labels: bool = False
    bytes_fixed: int = 0

    def __str__(self) -> str:
        notes = []
        if self.bytes is not None:
            notes.append(f"{self.bytes:,} bytes")
        elif self.bytes_per_sample is not None:
            more = f" and {self.bytes_fixed:,} more" if self.bytes_fixed else ""
            notes.append(f"{self.bytes_per_sample:,} bytes a sample{more}")
        if self.tells_labels:
            notes.append("the server can compute the labels from it")
        inner = "; ".join(notes)
        return f"{self.name} {self.declared}{f' ({inner})' if inner else ''}"

    @property
    def name(self) -> str:
        """Return the tensor's kind and name, such as ``activation 'relu1'``."""
        if self.kind == _WORDS[WireKind.NORM] or self.tensor == self.kind == LABELS:
            return self.kind
        link = " of" if self.kind == _WORDS[WireKind.GRADIENT] else ""
        return f"{self.kind}{link} '{self.tensor}'"


@dataclass(frozen=True, kw_only=True)
class Sending:
    """The tensors that one party sends in each step of a phase.

    ``batch`` is the number of samples per step, or ``None`` if it is unknown.
    """

    phase: str
    batch: int | None
    tensors: tuple[SentTensor, ...]

    @property
    def bytes(self) -> int | None:
        """Return the total size of all tensors in bytes, or ``None`` if a size is unknown."""
        sizes = [tensor.bytes for tensor in self.tensors]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def __str__(self) -> str:
        return ", ".join(map(str, self.tensors)) or "nothing"


def list_sent(
    manifest: PartyManifest, phase: str, sender: str = CLIENT, batch: int | None = None
) -> Sending:
    """List the tensors that ``sender`` sends in each step of a phase.

    ``batch`` is the number of samples per step, or ``None`` if it is unknown.  The result is the
    same for the client's manifest and the server's.
    """
    part = manifest.phase(phase)
    rows = name_rows(manifest, part)
    labels = list_labels(manifest)
    return Sending(
        phase=phase,
        batch=batch,
        tensors=tuple(
            replace(
                _describe(wire, wires, labels, rows, batch),
                tells_labels=wire.tensor.name in manifest.tells_labels,
            )
            for wire, wires in _list_carried(part)
            if wire.sender == sender
        ),
    )


def list_labels(manifest: PartyManifest) -> tuple[str, ...]:
    """List the arrays that only the loss reads: labels, and weights of samples.

    A server's manifest does not list the client's arrays.  It reveals the labels only if the client
    sends them: they are the only inputs that the client sends for training but not for prediction.
    """
    measured = manifest.phase(EVALUATE)
    predicted = manifest.phase(PREDICT).results
    known = [spec.name for spec in measured.data if spec.name not in predicted]
    sent = _list_inputs(manifest, TRAIN) - _list_inputs(manifest, PREDICT)
    return tuple(dict.fromkeys((*known, *sorted(sent))))


def find_batch(manifest: PartyManifest) -> int | None:
    """Return the batch size that the model requires, or ``None`` if it accepts any size."""
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
    """Return how many steps a run takes, and how many bytes the client sends in all of them.

    The run makes ``passes`` passes over ``samples`` samples in the given phase, with ``batch``
    samples per step.  Training skips a smaller last batch if the model's batch size is fixed.  The
    number of bytes is ``None`` if it is unknown.
    """
    steps, rest = divmod(samples, batch)
    full = list_sent(manifest, phase, CLIENT, batch).bytes
    if not rest or (phase == TRAIN and find_batch(manifest) is not None):
        return passes * steps, None if full is None else passes * steps * full
    last = list_sent(manifest, phase, CLIENT, rest).bytes
    known = full is not None and last is not None
    total = passes * (steps * (full or 0) + (last or 0)) if known else None
    return passes * (steps + 1), total


def _list_carried(phase: Phase) -> Iterator[tuple[Wire | Encoded, list[Wire]]]:
    """Yield each tensor that is sent with the wires that carry it: itself, if it is not encoded."""
    carriers = {name: one for one in phase.list_encoded() for name in one.wires}
    done: set[str] = set()
    for wire in phase.wires:
        encoded = carriers.get(wire.tensor.name)
        if encoded is None:
            yield wire, [wire]
        elif encoded.tensor.name not in done:
            done.add(encoded.tensor.name)
            yield encoded, [w for w in phase.wires if w.tensor.name in encoded.wires]


def _describe(
    wire: Wire | Encoded,
    wires: Sequence[Wire],
    labels: Sequence[str],
    rows: str | None,
    batch: int | None,
) -> SentTensor:
    """Describe a tensor that ``wires`` carry."""
    tensor = _strip_port(wire)
    sizes = {} if batch is None else bind_rows(rows, batch)
    declared = msgspec.structs.replace(
        wire.tensor, shape=tuple(_write(_fill_in(dim, sizes)) for dim in wire.tensor.shape)
    )
    is_labels = wire.kind is WireKind.INPUT and tensor in labels
    fixed = [count_bytes(sent.tensor, {}) for sent in wires] if len(wires) > 1 else [None]
    free = [sent.tensor for sent, size in zip(wires, fixed, strict=True) if size is None]
    return SentTensor(
        wire=wires[0].tensor.name,
        tensor=tensor,
        kind=LABELS if is_labels else _WORDS[wire.kind],
        declared=f"{declared} as {wire.codec}" if isinstance(wire, Encoded) else str(declared),
        bytes=_add(count_bytes(sent.tensor, sizes) for sent in wires),
        bytes_per_sample=_add(count_bytes_per_sample(spec, rows) for spec in free),
        bytes_fixed=sum(size or 0 for size in fixed) if free else 0,
    )


def _add(sizes: Iterable[int | None]) -> int | None:
    """Return the sum of sizes, or ``None`` if one is unknown."""
    known = list(sizes)
    return None if None in known else sum(size or 0 for size in known)


def count_bytes_per_sample(spec: TensorSpec, rows: str | None) -> int | None:
    """Return the size of a tensor per sample, in bytes.

    ``rows`` is the dimension for the number of samples, such as ``N``, or ``None`` if unknown.
    Return ``None`` if the tensor's size is unknown or not proportional to the number of samples.
    """
    one, two = (count_bytes(spec, bind_rows(rows, size)) for size in (1, 2))
    return one if one is not None and two == 2 * one else None


def count_bytes(spec: TensorSpec, sizes: Mapping[str, int]) -> int | None:
    """Return the size of a tensor in bytes, or ``None`` if ``sizes`` lacks one of its symbols."""
    dims = [_fill_in(dim, sizes) for dim in spec.shape]
    numbers = [dim for dim in dims if isinstance(dim, int)]
    dtype = DTYPES.get(spec.dtype)  # a manifest of somebody else's may declare any
    if dtype is None or len(numbers) < len(dims):
        return None
    return dtype.itemsize * math.prod(numbers)


def _strip_port(wire: Wire | Encoded) -> str:
    """Return the name of a tensor in the model, without the suffix that marks its direction."""
    name = wire.tensor.name
    back = CLIENT if wire.receiver == SERVER else SERVER
    if wire.kind is WireKind.GRADIENT:
        return name.removesuffix(f"@{back}_grad")
    if wire.kind is WireKind.PARAMETER:
        return name.removesuffix(OWN).removesuffix(JOINED)
    return name.removesuffix(f"@{wire.receiver}")


def _fill_in(dim: int | str | None, sizes: Mapping[str, int]) -> int | str | None:
    if not isinstance(dim, str):
        return dim
    size = evaluate(dim, sizes)
    return dim if size is None else size


def _write(dim: int | str | None) -> int | str | None:
    return describe_size(dim) if isinstance(dim, str) else dim


def bind_rows(rows: str | None, size: int) -> dict[str, int]:
    """Return the name in the dimension ``rows``, with its value if the dimension is ``size``."""
    names = [] if rows is None else find_unbound(rows, {})
    if rows is None or len(names) != 1:
        return {}
    bound = solve_for(names[0], rows, size, {})
    return {} if bound is None else {names[0]: bound}


def name_rows(manifest: PartyManifest, phase: Phase) -> str | None:
    """Return the dimension for the number of samples in a step, if there is exactly one.

    It is a name such as ``N``, or ``N_less_1 + 1`` if there are at least two samples.
    """
    rows = {spec.shape[0] for spec in _list_rows(manifest, phase)}
    name = next(iter(rows), None)
    return (
        name if len(rows) == 1 and isinstance(name, str) and is_name(describe_size(name)) else None
    )


def _list_rows(manifest: PartyManifest, phase: Phase) -> Iterable[TensorSpec]:
    """List the declarations whose first dimension counts the samples of a step."""
    carried = [wire for wire, _ in _list_carried(phase)]
    sent = [w.tensor for w in carried if w.sender == CLIENT and w.kind not in _WITHOUT_ROWS]
    declared = phase.data if manifest.party == CLIENT else sent
    return [spec for spec in declared if spec.shape]


def _list_inputs(manifest: PartyManifest, phase: str) -> set[str]:
    wires = manifest.phase(phase).wires
    return {_strip_port(w) for w in wires if w.sender == CLIENT and w.kind is WireKind.INPUT}


def describe_raw_states(manifest: PartyManifest) -> list[str]:
    """Return a sentence about each state in which a party keeps raw inputs from step to step."""
    return [
        f"keeps raw data: the state '{name}' holds raw input {quote(inputs)} of the step before, "
        "here and in checkpoints; merge leaves it out unless --raw-states is given"
        for name, inputs in manifest.raw_states.items()
    ]
