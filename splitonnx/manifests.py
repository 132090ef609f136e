"""Manifests: the files that tell a runtime how to run a bundle.

A manifest describes graphs and the values that they exchange, so that a runtime needs no knowledge
of neural networks.  A bundle's folder contains::

    manifest.json           BundleManifest: how the model was cut
    model.onnx              the model in inference form, without its trainable weights
    client/ server/         one complete folder per party:
        manifest.json       PartyManifest
        *.onnx              one file per stage
        weights.safetensors the weights that training starts from
        state.safetensors   the state after training; absent from a new bundle

A *phase* is the work of a party for one kind of task (``train``, ``predict``, ``evaluate``,
``share``; ``weigh``, ``accumulate`` and ``update`` for steps of several micro-batches).  It
consists of stages, each of which runs as soon as its inputs are available.  Values have names, and
the manifest declares the source of each input of a stage (:class:`Source`).  The manifest is the
complete contract between the partitioner and the runtime, and between the Python runtime and
runtimes in other languages.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

from splitonnx.errors import FormatError
from splitonnx.json_errors import JSON_ERRORS
from splitonnx.recipes import Recipe
from splitonnx.tensors import DTYPES, TensorSpec

FORMAT = "splitonnx.bundle/1"
_MARK = b'"sha256": "'
_BLANK = "0" * 64
MANIFEST = "manifest.json"
"""The name of the manifest's file, in a bundle's folder and in each party's folder."""
MAX_MANIFEST = 64 << 20
"""The largest manifest in bytes; a large model's manifest has some hundred thousand.

The JavaScript client accepts 16 MiB, because it runs on phones, and a decoded manifest is many
times larger than the file.
"""
MAX_SLOTS = 4
"""The largest number of tensors that an optimizer keeps per parameter."""

KEY = "splitonnx.key"
"""The name of an input that the runtime supplies, I64[3]: (seed, step, micro-batch).  Dropout
derives its mask from it."""
LEARNING_RATE = "splitonnx.learning_rate"
"""The name of an input that the runtime supplies, F32[]: the learning rate of the step."""
STEP = "splitonnx.step"
"""The name of an input that the runtime supplies, I64[]: the number of this update, counted from 1
(``t`` in Adam)."""


class Source(StrEnum):
    """The source from which a stage's input gets its value."""

    DATA = "data"  # an array of the caller's batch
    WIRE = "wire"  # sent by the other party
    STASH = "stash"  # kept from an earlier stage of this party in the same task
    STATE = "state"  # a parameter, buffer or optimizer state of this party
    SCALAR = "scalar"  # KEY, LEARNING_RATE or STEP, supplied by the runtime


class Role(StrEnum):
    """The role of a state tensor in training."""

    PARAMETER = "parameter"  # trained
    FROZEN = "frozen"  # a weight that keeps its value
    BUFFER = "buffer"  # replaced by each step: running statistics, and what a model hands itself
    OPTIMIZER = "optimizer"  # starts at zero; not part of weights.safetensors


class WireKind(StrEnum):
    """The purpose of a tensor that is sent to the other party."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"
    INPUT = "input"  # a raw input or the labels, named by the user or implied by a vanilla cut
    OUTPUT = "output"  # an output of the model
    REPORT = "report"  # loss or metric
    NORM = "norm"  # squared gradient norms, for clipping by the global norm
    PARAMETER = "parameter"  # a parameter or running statistic, to be joined with others' copies
    COUNT = "count"  # a number that says how micro-batches make a step


class StateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The declaration of a tensor that a party keeps from step to step; its shape is fixed."""

    tensor: TensorSpec
    role: Role


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """The declaration of a tensor that is sent from one party to the other within a task."""

    tensor: TensorSpec
    sender: str
    receiver: str
    kind: WireKind


class Encoded(msgspec.Struct, frozen=True, kw_only=True):
    """The declaration of a tensor that is sent in an encoded form, as its receiver decodes it.

    ``tensor`` is what a stage of the receiver makes from the tensors that ``wires`` names.  Its
    name is that of the tensor which the sender encodes.  ``codec`` is the codec in words, such as
    ``int8``; runtimes need not know it.
    """

    tensor: TensorSpec
    sender: str
    receiver: str
    kind: WireKind
    codec: str
    wires: tuple[str, ...]


class StageInput(msgspec.Struct, frozen=True, kw_only=True):
    """An input of a stage's graph: its name in the graph, and the source of its value."""

    name: str
    source: Source


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a phase: an ONNX graph that runs once per task, when all its inputs are available.

    ``graph`` is the name of the graph's file in the party's folder; stages may share one.  The
    graph may have other outputs than those in ``outputs``, which nothing needs of this stage.
    ``after`` names received or decoded tensors that the stage waits for although its graph does not
    read them; it is not written if there are none.  Such a stage makes again what an earlier stage
    made, with the same values.
    """

    name: str
    graph: str
    inputs: tuple[StageInput, ...]
    outputs: tuple[str, ...]
    after: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET

    @property
    def awaited(self) -> tuple[str, ...]:
        """Return the names in ``after``."""
        return () if self.after is msgspec.UNSET else self.after


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """The work of one party for one kind of task.

    ``data`` are the arrays that the caller must supply.  ``wires`` are all tensors that are sent in
    this phase, in both directions; both parties have the same list.  ``results`` are the names of
    the values that are returned to the caller.  ``commits`` maps the name of a state tensor to the
    stage output that replaces it.  All state tensors are replaced together, after every stage of
    the phase has run.  ``encoded`` are the tensors that some of ``wires`` carry in an encoded form;
    it is not written if there are none.
    """

    name: str
    stages: tuple[Stage, ...] = ()
    data: tuple[TensorSpec, ...] = ()
    wires: tuple[Wire, ...] = ()
    results: tuple[str, ...] = ()
    commits: dict[str, str] = {}
    encoded: tuple[Encoded, ...] | msgspec.UnsetType = msgspec.UNSET

    def list_encoded(self) -> tuple[Encoded, ...]:
        """Return the tensors that are sent in an encoded form."""
        return () if self.encoded is msgspec.UNSET else self.encoded


class ScoreKind(StrEnum):
    """What the numbers of an output are, for metrics that compare them with labels."""

    CLASSES = "classes"  # a score for each class; the labels are class indices
    BINARY = "binary"  # a score for yes; the labels are 1 for yes and 0 for no
    VALUES = "values"  # what the labels are


class ScoredOutput(msgspec.Struct, frozen=True, kw_only=True):
    """An output of the model that a loss compares with labels, for metrics of an evaluation.

    ``loss`` is the name of the loss if there are several, otherwise empty.  ``labels`` and
    ``sample_weights`` are names of arrays in the data.  Labels equal to ``ignore_index`` do not
    count.  ``class_axis`` is the axis of the classes.  ``are_probabilities`` is true if the output
    is the result of the Softmax or Sigmoid that the loss contains.
    """

    output: str
    labels: str
    kind: ScoreKind
    loss: str = ""
    class_axis: int | None = None
    ignore_index: int | None = None
    sample_weights: str | None = None
    are_probabilities: bool = False


class PartyManifest(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest of one party, stored as ``manifest.json`` in the party's folder.

    ``digest`` identifies the bundle and is the same for every party.  ``files`` maps the name of
    each graph file to its SHA-256 in hex.  ``learning_rate`` is the default learning rate.
    ``outputs`` declares the model outputs that ``predict`` returns.  ``scored`` says which of them
    losses compare with labels; only the client's manifest has it.  ``tells_labels`` names the
    gradients that the client sends and that reveal the labels to the server; bundles of earlier
    versions name none.  ``raw_states`` maps states that the model hands itself to the raw inputs of
    the step before that they hold; bundles of earlier versions name none.  ``remote_states`` names
    the states that the server keeps, which are inputs of the model and no arrays of the data; only
    the client's manifest has it, and bundles of earlier versions name none.  ``accumulators``
    declares the sums of gradients that a party keeps during a step of several micro-batches; they
    are zero at its start, and are never stored.  ``unweighable`` says why no step can consist of
    several micro-batches, and is empty if it can; only the client's manifest has it.  Bundles of
    earlier versions have neither of the two.  ``weights`` is the
    SHA-256 of ``weights.safetensors`` in hex.  It is set when the folder is written, and is empty
    in bundles of earlier versions.  ``sha256`` is the checksum of the manifest file itself (see
    :func:`has_valid_checksum`).  It is set only in the file; after decoding, it is empty.
    """

    format: str
    party: str
    digest: str
    target: str
    phases: tuple[Phase, ...]
    state: tuple[StateSpec, ...]
    files: dict[str, str]
    learning_rate: float
    outputs: tuple[TensorSpec, ...] = ()
    scored: tuple[ScoredOutput, ...] = ()
    tells_labels: tuple[str, ...] = ()
    raw_states: dict[str, tuple[str, ...]] = {}
    remote_states: tuple[str, ...] = ()
    accumulators: tuple[TensorSpec, ...] = ()
    unweighable: str = ""
    weights: str = ""
    sha256: str = ""

    def phase(self, name: str) -> Phase:
        """Return the phase with the given name, or an empty phase if the party has none."""
        return next((p for p in self.phases if p.name == name), Phase(name=name))


class BundleManifest(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest of a complete bundle, stored in the bundle's folder.

    ``files`` maps the name of the model's file to its SHA-256 in hex; it is empty in bundles of
    earlier versions.
    """

    format: str
    digest: str
    recipe: Recipe
    parties: tuple[str, ...]
    files: dict[str, str] = {}
    sha256: str = ""


_Manifest = TypeVar("_Manifest", PartyManifest, BundleManifest)


# msgspec crashes if two threads use a type for the first time simultaneously
_ANY = msgspec.json.Decoder()
_DECODERS: dict[type, Any] = {k: msgspec.json.Decoder(k) for k in (PartyManifest, BundleManifest)}


def encode_manifest(manifest: PartyManifest | BundleManifest) -> bytes:
    """Encode a manifest as indented JSON, with keys in a fixed order for readable diffs.

    The last key is the SHA-256 of the file, computed with zeros in place of the checksum itself.
    """
    blank = msgspec.structs.replace(manifest, sha256=_BLANK)
    content = msgspec.json.format(msgspec.json.encode(blank), indent=2) + b"\n"
    before, mark, after = content.rpartition(_MARK)
    found = hashlib.sha256(content).hexdigest().encode()
    return before + mark + found + after[len(found) :]


def has_valid_checksum(content: bytes) -> bool:
    """Return whether the content of a manifest file matches the checksum stored in the file.

    Files of earlier versions contain no checksum and always pass.
    """
    before, mark, after = content.rpartition(_MARK)
    if not mark:
        return True
    found, rest = after[: len(_BLANK)], after[len(_BLANK) :]
    blank = before + mark + _BLANK.encode() + rest
    return hashlib.sha256(blank).hexdigest().encode() == found


def decode_manifest(content: bytes, kind: type[_Manifest], source: str) -> _Manifest:
    """Decode a manifest, and check its declarations of state tensors and of tensors to be sent.

    ``kind`` is the expected class.  ``source`` is the name of the file; it is used in error
    messages.

    Raises:
        FormatError: the bytes are not JSON, a field is missing or has the wrong type, the format
            version is not supported, a declaration of a state tensor is not valid, or a dimension
            of a tensor to be sent is neither a number nor an expression.
    """
    try:
        manifest: _Manifest = _DECODERS[kind].decode(content)
    except JSON_ERRORS as error:
        reason = _find_other_kind(content, kind) or f"not a manifest of splitonnx: {error}"
        raise FormatError(source, reason) from error
    if manifest.format != FORMAT:
        raise FormatError(source, f"its format is '{manifest.format}', this version reads {FORMAT}")
    if isinstance(manifest, PartyManifest):
        _check_state(manifest, source)
        _check_wires(manifest, source)
    return msgspec.structs.replace(manifest, sha256="")


def _find_other_kind(content: bytes, kind: type[msgspec.Struct]) -> str:
    """Return which folder to name if a manifest is of the other kind, or else an empty string."""
    try:
        found = _ANY.decode(content)
    except JSON_ERRORS:
        return ""
    keys = found.keys() if isinstance(found, dict) else ()
    if kind is PartyManifest and "recipe" in keys and "party" not in keys:
        return "this is a whole bundle; name the folder of one party in it, client or server"
    if kind is not PartyManifest and "party" in keys and "recipe" not in keys:
        return "this is the folder of one party; name the folder of the whole bundle, above it"
    return ""


def _check_wires(manifest: PartyManifest, source: str) -> None:
    """Check that each dimension of a tensor to be sent is a number or a name."""
    for phase in manifest.phases:
        for wire in phase.wires:
            if None in wire.tensor.shape:
                raise FormatError(
                    source,
                    f"wire '{wire.tensor.name}' of phase '{phase.name}' is {wire.tensor}, and "
                    "nothing binds the dimension '?'; cut the model again with this version",
                )


def _check_state(manifest: PartyManifest, source: str) -> None:
    """Check that the state is valid, and that it does not declare too many optimizer tensors.

    Memory for the optimizer's tensors is allocated as the manifest declares, without a file to
    compare them with.  Therefore each must have the shape of a parameter, with at most
    ``MAX_SLOTS`` tensors per parameter.  The parameters themselves are compared with a file.
    """
    names: set[str] = set()
    room: Counter[tuple[int | str | None, ...]] = Counter()
    for spec in manifest.state:
        room[spec.tensor.shape] += MAX_SLOTS * (spec.role is Role.PARAMETER)
    for spec in manifest.state:
        name, dims, dtype = spec.tensor.name, spec.tensor.shape, spec.tensor.dtype
        known = dtype in DTYPES and all(isinstance(dim, int) and dim >= 0 for dim in dims)
        held = spec.role is not Role.OPTIMIZER or room[dims] > 0
        if not known or not held or name in names:
            raise FormatError(source, f"no party has a state '{name}' of {spec.tensor}")
        names.add(name)
        room[dims] -= spec.role is Role.OPTIMIZER
    _check_accumulators(manifest, source)


def _check_accumulators(manifest: PartyManifest, source: str) -> None:
    """Check that there is at most one sum of gradients for each parameter, of its type and shape.

    Their memory, too, is allocated as the manifest declares.
    """
    names = {spec.tensor.name for spec in manifest.state}
    parameters = [spec.tensor for spec in manifest.state if spec.role is Role.PARAMETER]
    room = Counter((tensor.dtype, tensor.shape) for tensor in parameters)
    for tensor in manifest.accumulators:
        room[tensor.dtype, tensor.shape] -= 1
        if tensor.name in names or room[tensor.dtype, tensor.shape] < 0:
            reason = f"no party has an accumulator '{tensor.name}' of {tensor}"
            raise FormatError(source, reason)
        names.add(tensor.name)
