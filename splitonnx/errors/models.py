"""Errors in the user's model, and in the choice of a cut."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from splitonnx.errors.roots import SplitonnxError, count_some, name_tensor, quote


class ModelError(SplitonnxError):
    """The user's ONNX model cannot be used as it is."""


@dataclass(eq=False)
class NotAModel(ModelError):
    """The bytes are not an ONNX model, or the ONNX checker rejects the model."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source} is not a usable ONNX model: {self.reason}"


@dataclass(eq=False)
class UnsupportedModel(ModelError):
    """The model is valid ONNX, but uses something that splitonnx does not support."""

    subject: str
    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}" + (f"; {self.advice}" if self.advice else "")


@dataclass(eq=False)
class NativeCrash(UnsupportedModel):
    """Native code of onnx or ONNX Runtime crashed or took too long while processing the model.

    If ``is_breakdown`` is true, it ended its process, and not because of a limit on time or memory.
    """

    is_breakdown: bool = False


class TooManyTries(UnsupportedModel):
    """Checking every possible single-tensor cut of the model would take too long."""


@dataclass(eq=False)
class InternalModelError(SplitonnxError):
    """The processing of a model failed because of a bug in splitonnx.

    ``work`` describes what splitonnx was doing.
    """

    subject: str
    work: str
    reason: str

    def __str__(self) -> str:
        return (
            f"a mistake in splitonnx, not in the model: {self.subject}, while it was {self.work} "
            f"({self.reason}); please report it, with the traceback that SPLITONNX_TRACEBACK=1 "
            "shows"
        )


@dataclass(eq=False)
class DifferentResult(SplitonnxError):
    """A model computes different results after ``cut`` than before, because of a bug in splitonnx.

    ``subject`` describes the model, and ``made`` describes what was compared with it.  ``tensor``
    is the output that differs, and ``first`` is the first tensor of the model that differs.
    ``size`` is the difference divided by the largest expected value.
    """

    subject: str
    made: str
    tensor: str
    first: str
    size: float

    def __str__(self) -> str:
        start = "" if self.first == self.tensor else f", from tensor '{self.first}' on"
        return (
            f"a mistake in splitonnx, not in the model: {self.made} differs from {self.subject} by "
            f"{self.size:.1e} of the largest value in '{self.tensor}'{start}; please report it "
            "with the model; --no-check (check=False) leaves out this comparison"
        )


@dataclass(eq=False)
class MixedSamples(ModelError):
    """The samples of a batch influence each other, because the export fixed their number.

    ``subject`` describes the model.  ``options`` are the user's options, which changed the number
    of samples from ``rows``.  ``node`` is the name of the first node with a wrong output, and
    ``operator`` is the node's operator.  ``tensor`` is this output, and ``output`` is an output of
    the model.  Both differ from the results that are computed for each sample alone.
    """

    subject: str
    options: str
    rows: int
    node: str
    operator: str
    tensor: str
    output: str

    def __str__(self) -> str:
        each = "each sample alone" if self.rows == 1 else f"each {self.rows} samples alone"
        result = "" if self.output == self.tensor else f", and neither is output '{self.output}'"
        return (
            f"with {self.options}, node '{self.node}' ({self.operator}) of {self.subject} mixes or "
            f"drops samples, since it was exported for a batch of {self.rows}: '{self.tensor}' is "
            f"not what it is for {each}{result}; export the model again with a dynamic batch, or "
            f"leave out {self.options} and train with --batch-size {self.rows}"
        )


@dataclass(eq=False)
class BatchNotFreed(ModelError):
    """A model does not run with the number of samples that the user asked for.

    ``subject`` describes the model.  ``options`` are the user's options, which changed the number
    of samples from ``rows`` to any number, or to ``tried``.
    """

    subject: str
    options: str
    rows: int
    tried: int
    reason: str

    def __str__(self) -> str:
        return (
            f"with {self.options}, {self.subject} does not run on {self.tried} samples, since it "
            f"was exported for a batch of {self.rows}; export it again with a dynamic batch, or "
            f"leave out {self.options} and train with --batch-size {self.rows}; what failed is: "
            f"{' '.join(self.reason.split())}"
        )


@dataclass(eq=False)
class ForbiddenExternalData(ModelError):
    """A tensor's data are stored in an external file that is outside the model's folder."""

    tensor: str
    location: str

    def __str__(self) -> str:
        return (
            f"tensor '{self.tensor}' keeps its data in '{self.location}', outside the model's own "
            "folder; move the file beside the model or save the model in one piece"
        )


@dataclass(eq=False)
class NotDifferentiable(ModelError):
    """An operator between a trainable parameter and the loss has no gradient."""

    node: str
    operator: str
    advice: str = ""

    def __str__(self) -> str:
        tail = f"; {self.advice}" if self.advice else ""
        return (
            f"node '{self.node}' ({self.operator}) is between a trainable parameter and the "
            f"loss, and {self.operator} has no gradient{tail}"
        )


@dataclass(eq=False)
class ForbiddenOperator(SplitonnxError):
    """Due to a bug in splitonnx, a graph contains an operator that the graph's runtime rejects."""

    stage: str
    node: str
    operator: str
    domain: str
    version: int

    def __str__(self) -> str:
        domain = self.domain or "ai.onnx"
        return (
            f"internal error of splitonnx, no bundle is written: in the graph of stage "
            f"'{self.stage}', node '{self.node}' is {self.operator} of the domain '{domain}' in "
            f"version {self.version}, which its runtime does not run; report it, with the model "
            "if you may"
        )


class CutError(SplitonnxError):
    """Base class of errors in the user's choice of a cut."""


@dataclass(eq=False)
class UnknownTensor(CutError):
    """The model has no tensor or node with the given name."""

    name: str
    nearest: Sequence[str] = ()

    def __str__(self) -> str:
        offer = f"; did you mean {quote(self.nearest)}?" if self.nearest else ""
        return f"the model has no tensor or node '{self.name}'{offer}"


@dataclass(eq=False)
class NotACut(CutError):
    """The named tensors do not divide the model into two parts.

    ``missing`` are the additional tensors that would have to cross the cut.  If some of them are
    inputs of the model (such as an attention mask), or are computed only from inputs of the model,
    ``raw`` lists these inputs.  ``is_back`` means that the missing tensors would come back from the
    server.  ``others`` lists tensors that divide the model: each could replace the tensors that
    the client would send.  ``settings`` lists the inputs in ``raw`` that are probably the same for
    every batch, such as a sampling rate; ``--bind`` can fix them.
    """

    tensors: Sequence[str]
    missing: Sequence[str] = ()
    reason: str = ""
    raw: Sequence[str] = ()
    is_back: bool = False
    others: Sequence[str] = ()
    settings: Sequence[str] = ()

    def __str__(self) -> str:
        named = list(dict.fromkeys(self.tensors))
        verb = "does" if len(named) == 1 else "do"
        return f"{count_some(named)} {verb} not divide the model: {self._describe()}"

    def _describe(self) -> str:
        others = " or ".join(f"'{name}'" for name in self.others)
        lists = "(`splitonnx inspect` lists the single-tensor cuts)"
        if not self.missing:
            return self.reason + (f"; {others} would divide it {lists}" if others else "")
        source = f" (of the raw input {quote(self.raw)}, which stays home)" if self.raw else ""
        options = " ".join(f"--send-input {shlex.quote(name)}" for name in self.raw)
        named = f", with {options}" if self.raw else ""
        place = "--tail-at" if self.is_back else "--at"
        missing = count_some(self.missing, most=8)
        return (
            f"{missing} would cross too{source}; to let this cross, name it with "
            f"{place} as well{named}, or cut at {others or 'another tensor'} instead {lists}"
            f"{self._describe_binding()}"
        )

    def _describe_binding(self) -> str:
        if not self.settings:
            return ""
        options = " ".join(f"--bind {shlex.quote(name)}=VALUE" for name in self.settings)
        return f"; or fix it with {options}, if it always has the same value"


@dataclass(eq=False)
class InputsNotPermitted(CutError):
    """A cut would send raw inputs to the server without the user's permission.

    ``inputs`` are the names of these raw inputs.  ``tensors`` are the tensors that would be sent:
    the inputs themselves, or tensors computed from them without a layer that has weights.
    ``labels`` means that the labels would also be sent without permission.
    """

    tensors: Sequence[str]
    inputs: Sequence[str]
    labels: bool = False

    def __str__(self) -> str:
        options = [f"--send-input {shlex.quote(name)}" for name in self.inputs]
        arguments = [f"send_inputs=[{', '.join(map(repr, self.inputs))}]"]
        if self.labels:
            options.append("--send-labels")
            arguments.append("send_labels=True")
        derived = [name_tensor(name) for name in self.tensors if name not in self.inputs]
        sends, instead = f"the raw input {quote(self.inputs)}", "cut behind the first layer"
        if derived:
            source = f"computed on a path without a layer of weights from {sends}"
            sends = f"{', '.join(derived)}, {source}"
            instead = "cut behind the next layer"
        ways = [f"{instead} with weights{' on this path' if derived else ''}"]
        told = [name for name in self.tensors if name.endswith("@client_grad")]
        if told:  # the client's tail sends these: it lacks a layer, not the head
            earlier = "end the server's part earlier, with --tail-at (tail_at=) before the last "
            ways = [*(ways if len(told) < len(self.tensors) else ()), f"{earlier}layer of weights"]
        return (
            f"this cut would send {sends}{', and the labels' if self.labels else ''}; to let this "
            f"leave the client, add {' '.join(options)} (in Python: {', '.join(arguments)}), else "
            f"{' and '.join(ways)}"
        )


@dataclass(eq=False)
class LabelsNotPermitted(CutError):
    """A cut would send the labels to the server without the user's permission.

    ``gradients`` names tensors whose gradients tell the server the labels; it is empty if the
    labels themselves would be sent.
    """

    gradients: Sequence[str] = ()

    def __str__(self) -> str:
        if self.gradients:
            return (
                "the client has no layer of weights between the loss and "
                f"{quote(self.gradients)}, so the server could compute the labels from the "
                "gradient that this cut sends; cut further forward with --tail-at NAME "
                "(tail_at=), before the last layer of weights, so that the client has this layer; "
                "or, to let the labels leave the client, add --send-labels (in Python: "
                "send_labels=True)"
            )
        return (
            "the server would compute the loss, so this cut would send the labels; to let them "
            "leave the client, add --send-labels (in Python: send_labels=True), or keep them there "
            "with --tail-at NAME (tail_at=), and the last layers and the loss with them"
        )


@dataclass(eq=False)
class IntegerCut(CutError):
    """A tensor at the cut has no gradient, although trainable parameters come before it."""

    tensor: str
    dtype: str
    parameters: Sequence[str]

    def __str__(self) -> str:
        return (
            f"the cut tensor '{self.tensor}' is {self.dtype} and carries no gradient, but the "
            f"trainable {quote(self.parameters)} are before it; cut elsewhere or freeze them"
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
