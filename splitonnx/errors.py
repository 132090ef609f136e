"""Every error that splitonnx raises on purpose, split by whose fault it is.

An exception stores facts as attributes and composes its sentence in ``__str__``: what was
expected, what came, what to do next.  The command line prints that sentence on one line and
exits with code 2.  This module knows no model, no file format and no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


def _list_steps(steps: Iterable[int]) -> str:
    return " or ".join(str(step) for step in steps) or "none"


def quote(names: Iterable[str]) -> str:
    """Join names for a sentence: ``'a', 'b'``."""
    return ", ".join(f"'{name}'" for name in names)


def flatten(text: str, most: int = 300) -> str:
    """Make text that others wrote fit a sentence: one line, printable, of ``most`` characters."""
    line = "".join(char if char.isprintable() else "?" for char in text[:most])
    return f"{line}..." if len(text) > most else line


class SplitonnxError(Exception):
    """Root of the tree; catching it catches every error raised on purpose."""


# --- the model ------------------------------------------------------------------------------


class ModelError(SplitonnxError):
    """The user's ONNX model cannot be used as it is."""


@dataclass(eq=False)
class NotAModel(ModelError):
    """The bytes are no ONNX model, or one that no checker accepts."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source} is not a usable ONNX model: {self.reason}"


@dataclass(eq=False)
class UnsupportedModel(ModelError):
    """The model is valid ONNX, but uses something that splitonnx does not take."""

    subject: str
    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}" + (f"; {self.advice}" if self.advice else "")


class NativeCrash(UnsupportedModel):
    """Native code of onnx or ONNX Runtime ended its process over the model, or took too long."""


class BrokenWork(UnsupportedModel):
    """The work on the model broke off, and no node is known to be at fault."""


@dataclass(eq=False)
class ForbiddenExternalData(ModelError):
    """A tensor's external data lies outside the folder of the model."""

    tensor: str
    location: str

    def __str__(self) -> str:
        return (
            f"tensor '{self.tensor}' keeps its data in '{self.location}', outside the model's own "
            "folder; move the file beside the model or save the model in one piece"
        )


@dataclass(eq=False)
class NotDifferentiable(ModelError):
    """An operator on the way from a trainable parameter to the loss has no gradient."""

    node: str
    operator: str
    advice: str = ""

    def __str__(self) -> str:
        tail = f"; {self.advice}" if self.advice else ""
        return (
            f"node '{self.node}' ({self.operator}) lies between a trainable parameter and the "
            f"loss, and {self.operator} has no gradient{tail}"
        )


# --- the cut --------------------------------------------------------------------------------


class CutError(SplitonnxError):
    """The place where the user wants to cut is not one where this model can be cut."""


@dataclass(eq=False)
class UnknownTensor(CutError):
    """A name that the model does not contain."""

    name: str
    nearest: Sequence[str] = ()

    def __str__(self) -> str:
        offer = f"; did you mean {quote(self.nearest)}?" if self.nearest else ""
        return f"the model has no tensor or node '{self.name}'{offer}"


@dataclass(eq=False)
class NotACut(CutError):
    """The named tensors do not divide the model.

    ``missing`` would have to cross as well; ``raw`` names the inputs that some of it are or are
    made of alone, such as an attention mask.
    """

    tensors: Sequence[str]
    missing: Sequence[str] = ()
    reason: str = ""
    raw: Sequence[str] = ()

    def __str__(self) -> str:
        if self.missing:
            source = f" (of the raw input {quote(self.raw)}, which stays home)" if self.raw else ""
            return (
                f"{quote(self.tensors)} do not divide the model: {quote(self.missing)} would cross "
                f"too{source}; add them to the cut to let them cross, or choose another one "
                "(`splitonnx inspect` lists the single-tensor cuts)"
            )
        return f"{quote(self.tensors)} do not divide the model: {self.reason}"


@dataclass(eq=False)
class IntegerCut(CutError):
    """A cut tensor carries no gradient although trainable parameters lie before it."""

    tensor: str
    dtype: str
    parameters: Sequence[str]

    def __str__(self) -> str:
        return (
            f"the cut tensor '{self.tensor}' is {self.dtype} and carries no gradient, but the "
            f"trainable {quote(self.parameters)} lie before it; cut elsewhere or freeze them"
        )


@dataclass(eq=False)
class SharedParameter(CutError):
    """A trainable tensor is used on both sides of the cut."""

    parameters: Sequence[str]

    def __str__(self) -> str:
        return (
            f"{quote(self.parameters)} would be trained on both sides of the cut; cut so that one "
            "party holds every use, or freeze with --freeze"
        )


# --- the data -------------------------------------------------------------------------------


class DataError(SplitonnxError):
    """The training or prediction data do not fit the model."""


@dataclass(eq=False)
class MissingArray(DataError):
    """The data lack an array that the model needs."""

    name: str
    present: Sequence[str]

    def __str__(self) -> str:
        return f"the data have no array '{self.name}'; they hold {quote(self.present) or 'none'}"


@dataclass(eq=False)
class ArrayMismatch(DataError):
    """An array, or a tensor on the wire, differs from its declaration in dtype or shape."""

    name: str
    expected: str
    actual: str

    def __str__(self) -> str:
        return f"'{self.name}' should be {self.expected}, but is {self.actual}"


@dataclass(eq=False)
class ValueOutOfRange(DataError):
    """An integer array, labels as a rule, holds a value outside its declared range."""

    name: str
    value: int
    lower: int
    upper: int

    def __str__(self) -> str:
        return f"'{self.name}' holds {self.value}; allowed are {self.lower} to {self.upper - 1}"


@dataclass(eq=False)
class NotFinite(DataError):
    """A tensor holds NaN or infinity."""

    name: str
    where: str

    def __str__(self) -> str:
        return f"'{self.name}' holds NaN or infinity ({self.where}); nothing was updated with it"


@dataclass(eq=False)
class NormTooLarge(DataError):
    """A gradient is larger than the limit that was set against poisoned ones."""

    name: str
    norm: float
    limit: float

    def __str__(self) -> str:
        return (
            f"the gradient '{self.name}' has the norm {self.norm:g}, over the limit of "
            f"{self.limit:g}; nothing was updated with it"
        )


@dataclass(eq=False)
class UnusableData(DataError):
    """The data's file or iterable itself cannot be read as arrays."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


# --- bundles and files ----------------------------------------------------------------------


@dataclass(eq=False)
class BundleError(SplitonnxError):
    """A bundle's folder is missing, incomplete, altered, or in the way."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(eq=False)
class NotSaved(SplitonnxError):
    """A checkpoint cannot be written: the disk is full, the folder read-only, or the like."""

    path: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.path} cannot be written: {self.reason}; what was saved before it stands, but "
            "training since then is not saved"
        )


@dataclass(eq=False)
class ForbiddenGraph(SplitonnxError):
    """A stage's graph is malformed, or holds what no bundle does; ONNX Runtime never saw it."""

    stage: str
    subject: str
    reason: str

    def __str__(self) -> str:
        return (
            f"the graph of stage '{self.stage}' is not run, {self.subject}: {self.reason}; "
            "take a bundle as `splitonnx cut` wrote it"
        )


@dataclass(eq=False)
class FormatError(SplitonnxError):
    """Bytes that should be tensors in the safetensors layout, or JSON of ours, are not."""

    subject: str
    reason: str

    def __str__(self) -> str:
        return f"{self.subject}: {flatten(self.reason)}"


@dataclass(eq=False)
class NotExportable(SplitonnxError):
    """A stage needs what the ONNX Runtime of a phone lacks; ``party`` is whose stage it is."""

    graph: str
    operators: Sequence[str]
    party: str

    def __str__(self) -> str:
        return (
            f"'{self.graph}' has training operators that ONNX Runtime's mobile packages lack, "
            f"{', '.join(self.operators)}; cut the model with --{self.party}-target portable"
        )


@dataclass(eq=False)
class UnwritableFile(SplitonnxError):
    """An output file cannot be written, or something stands in its place."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} cannot be written: {self.reason}"


@dataclass(eq=False)
class UnfinishedRun(SplitonnxError):
    """Training in this folder was broken off, and another run is about to begin."""

    path: str
    step: int

    def __str__(self) -> str:
        return (
            f"{self.path}: training was broken off at step {self.step}; go on with --resume, or "
            "give that run up with --restart"
        )


# --- the environment ------------------------------------------------------------------------


@dataclass(eq=False)
class MissingExtra(SplitonnxError):
    """A package is missing that an extra of splitonnx would have installed."""

    module: str
    extra: str
    purpose: str

    def __str__(self) -> str:
        return (
            f"{self.purpose} needs '{self.module}', which is not installed; "
            f"run: pip install 'splitonnx[{self.extra}]'"
        )


@dataclass(eq=False)
class WrongRuntime(SplitonnxError):
    """The installed ONNX Runtime is not the one that the work needs."""

    installed: str
    needed: str

    def __str__(self) -> str:
        return f"the installed ONNX Runtime is {self.installed}, but this needs {self.needed}"


@dataclass(eq=False)
class ProcessFailed(SplitonnxError):
    """The process that native code runs in cannot be started."""

    module: str
    reason: str

    def __str__(self) -> str:
        return (
            f"no process can be started for native code ({self.reason}); "
            f"see what `python -m {self.module}` says"
        )


@dataclass(eq=False)
class UsageError(SplitonnxError):
    """Options or arguments that contradict each other or lie outside their range."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False)
class StageFailed(SplitonnxError):
    """ONNX Runtime could not load or run a stage."""

    stage: str
    reason: str

    def __str__(self) -> str:
        return f"stage '{self.stage}' failed: {self.reason}"


# --- the connection -------------------------------------------------------------------------


class ProtocolError(SplitonnxError):
    """Root of what can go wrong between two parties."""


@dataclass(eq=False)
class LocalProtocolError(ProtocolError):
    """This side tried to send what the protocol does not allow now: a bug on this side."""

    reason: str

    def __str__(self) -> str:
        return f"not allowed now: {self.reason}"


@dataclass(eq=False)
class RemoteProtocolError(ProtocolError):
    """The other side sent what the protocol does not allow."""

    reason: str

    def __str__(self) -> str:
        return f"the other side broke the protocol: {flatten(self.reason)}"


@dataclass(eq=False)
class BundleMismatch(ProtocolError):
    """The two sides were not cut together, or stand at different steps."""

    subject: str
    local: str
    remote: str
    advice: str = "use the two folders of one bundle"

    def __str__(self) -> str:
        return (
            f"client and server do not belong together: {flatten(self.subject)} is {self.local} "
            f"here and {flatten(self.remote)} there; {self.advice}"
        )


@dataclass(eq=False)
class ServerBusy(ProtocolError):
    """The server has as many clients or sessions as it takes; ``limit`` says which and how many."""

    limit: str

    def __str__(self) -> str:
        return f"the server is full ({self.limit}); try again later"


@dataclass(eq=False)
class StaleConnection(ProtocolError):
    """A newer connection has taken the session over; ``newest`` is its generation."""

    generation: int
    newest: int

    def __str__(self) -> str:
        return (
            f"connection {self.generation} of this session was replaced by connection "
            f"{self.newest}; two clients must not train one session"
        )


@dataclass(eq=False)
class SessionLost(ProtocolError):
    """The server cannot go on with a session at any step at which the client could."""

    session: str
    wanted: Sequence[int]
    present: Sequence[int]

    def __str__(self) -> str:
        return (
            f"the server cannot go on with session {self.session}: the client could at step "
            f"{_list_steps(self.wanted)}, the server at {_list_steps(self.present)}; serve with "
            "--resume the folder that it was trained with, or train anew with --restart"
        )


@dataclass(eq=False)
class ForeignSession(ProtocolError):
    """A session that belongs to another token's owner was asked for."""

    session: str

    def __str__(self) -> str:
        return f"session {self.session} was begun with another token; only that one goes on with it"


@dataclass(eq=False)
class StepConflict(ProtocolError):
    """A step that was made already is asked for once more, with other inputs."""

    step: int

    def __str__(self) -> str:
        return (
            f"step {self.step} was made already, with other inputs; train with the same data, "
            "batches and seed, or anew with --restart"
        )


@dataclass(eq=False)
class StepsLost(ProtocolError):
    """The server lost steps, and both sides went back to ``step``: go on from there."""

    step: int

    def __str__(self) -> str:
        return (
            f"the server lost its newest steps, and both sides went back to step {self.step}; "
            "give it the batches again from there"
        )


@dataclass(eq=False)
class RemoteFault(ProtocolError):
    """The other side reported an error of its own."""

    code: str
    reason: str

    def __str__(self) -> str:
        return f"the other side reported {flatten(self.code)}: {flatten(self.reason)}"


@dataclass(eq=False)
class ConnectionLost(ProtocolError):
    """The connection could not be made, broke, or fell silent for too long: worth trying again.

    ``code`` is the websocket's closing code (1012: the server starts anew, 1013: it is full), or
    the HTTP status with which a handshake was refused (503: it is full); ``None`` where there was
    neither.
    """

    peer: str
    reason: str
    code: int | None = None

    def __str__(self) -> str:
        return f"connection to {self.peer} lost: {flatten(self.reason)}"


@dataclass(eq=False)
class Unauthorized(ProtocolError):
    """The server knows whoever asks and lets them not in: trying again does not help.

    ``status`` is the HTTP status, or the closing code 1008 where a first message was refused.
    """

    peer: str
    status: int
    reason: str

    def __str__(self) -> str:
        return f"{self.peer} refused to let this side in ({self.status}): {flatten(self.reason)}"


@dataclass(eq=False)
class UntrustedPeer(ProtocolError):
    """TLS could not make sure who the other side is: trying again does not help."""

    peer: str
    reason: str

    def __str__(self) -> str:
        return f"{self.peer} cannot be trusted: {flatten(self.reason)}"


@dataclass(eq=False, kw_only=True)
class MessageTooLarge(ProtocolError):
    """A message is over its receiver's limit: sending it again does not help."""

    peer: str = field(kw_only=False)
    is_outgoing: bool
    reason: str

    def __str__(self) -> str:
        if self.is_outgoing:
            return (
                f"{self.peer} takes no message as large as this side's ({flatten(self.reason)}); "
                "make the batch smaller, or serve with a larger --max-message-bytes"
            )
        return (
            f"{self.peer} sent a message larger than this side takes ({flatten(self.reason)}); "
            "make the batch smaller"
        )


@dataclass(eq=False)
class UnusableFile(SplitonnxError):
    """A file of tokens, a certificate or a key cannot be read as what it should be."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(eq=False)
class PortInUse(SplitonnxError):
    """The server's port is taken."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"port {self.port} on {self.host} is in use; choose another with --port"
