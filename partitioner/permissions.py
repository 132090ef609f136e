"""Cut a model for a user, who decides which raw inputs and labels may leave the client.

Users call :func:`cut`.  It returns the same bundle as :func:`partitions.cut`, but refuses a cut
that would send raw inputs or labels without the user's permission.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from splitonnx.bundles import Bundle
from splitonnx.errors import (
    InputsNotPermitted,
    LabelsNotPermitted,
    UsageError,
    list_some,
    quote,
)
from splitonnx.losses import CROSS_ENTROPY, LABELS, LossSource
from splitonnx.manifests import WireKind
from splitonnx.names import CLIENT, TRAINING, BatchNormModes, DropoutMode, Recompute, Target
from splitonnx.optimizers import Optimizer
from splitonnx.partitioner import partitions
from splitonnx.partitioner.cutting.carried_states.declarations import Pairs
from splitonnx.partitioner.cutting.carried_states.raw_inputs import trace_raw_inputs
from splitonnx.partitioner.cutting.joints import JointGraph
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.cutting.transforms.codec_errors import describe_codec_error
from splitonnx.partitioner.cutting.transforms.crossings import encode_crossings
from splitonnx.partitioner.cutting.transforms.recomputations import recompute_stages
from splitonnx.partitioner.gate.adjustments import Binding
from splitonnx.partitioner.gate.gates import ModelSource
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.native.workers import start
from splitonnx.wire_codecs import read_wire

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Permission:
    """The data that may leave the client.

    ``inputs`` names the raw inputs that the user permits to be sent.  ``labels`` is true if the
    user permits the labels to be sent.
    """

    inputs: tuple[str, ...] = ()
    labels: bool = False

    @attribute_errors_to_pass("searched for what leaves the client")
    def check(self, prepared: PreparedModel, training: JointGraph, predict: JointGraph) -> None:
        """Check that a cut sends all permitted raw inputs and labels, and no others.

        ``training`` and ``predict`` are the graphs of the cut model for training and prediction.

        Raises:
            InputsNotPermitted: the cut sends a raw input without permission.
            LabelsNotPermitted: the cut sends the labels without permission.
            UsageError: the cut does not send a raw input or the labels, although this is permitted.
        """
        leaving = self._refuse_unnamed(prepared, training, predict)
        raw = _list_raw(prepared)
        sent = {name for inputs in leaving.values() for name in inputs}
        self._check_named(sent, raw - prepared.state)
        self._check_labels(sends_labels(training, raw), find_labels_in_gradients(training))

    @attribute_errors_to_pass("searched for what leaves the client")
    def check_forward(self, prepared: PreparedModel, training: JointGraph) -> None:
        """Check that a cut sends only permitted raw inputs and labels, not counting gradients.

        ``training`` is the graph for training before it is differentiated, so gradients are not in
        the graph yet.

        Raises:
            InputsNotPermitted: the cut sends a raw input without permission.
            LabelsNotPermitted: the cut sends the labels without permission.
        """
        self._refuse_unnamed(prepared, training)
        if sends_labels(training, _list_raw(prepared)) and not self.labels:
            raise LabelsNotPermitted

    def _refuse_unnamed(
        self, prepared: PreparedModel, training: JointGraph, *others: JointGraph
    ) -> dict[str, list[str]]:
        """Map each tensor that holds raw data to the inputs it holds; refuse inputs not permitted.

        Raises:
            InputsNotPermitted: the cut sends a raw input without permission.
        """
        raw = _list_raw(prepared)
        leaving: dict[str, list[str]] = {}
        data = raw - prepared.state
        for joint in (training, *others):
            found = find_raw_inputs(joint, data, prepared, training.held)
            for tensor, inputs in found.items():
                leaving[tensor] = inputs
        unnamed = {
            tensor: [name for name in inputs if name not in self.inputs]
            for tensor, inputs in leaving.items()
        }
        missing = sorted({name for inputs in unnamed.values() for name in inputs})
        if missing:
            tensors = [tensor for tensor, inputs in unnamed.items() if inputs]
            needs_labels = sends_labels(training, raw) or find_labels_in_gradients(training)
            raise InputsNotPermitted(
                tensors, missing, labels=bool(needs_labels) and not self.labels
            )
        return leaving

    def _check_named(self, leaving: set[str], raw: set[str]) -> None:
        if unknown := [name for name in dict.fromkeys(self.inputs) if name not in raw]:
            raise UsageError(
                f"--send-input names {quote(unknown)}, but the inputs of the model are "
                f"{list_some(sorted(raw))}"
            )
        if unsent := [name for name in dict.fromkeys(self.inputs) if name not in leaving]:
            sends = f"the raw inputs {quote(sorted(leaving))}" if leaving else "no raw input"
            raise UsageError(
                f"--send-input names {quote(unsent)}, but this cut sends {sends}; leave it out, or "
                "name the input with --at too"
            )

    def _check_labels(self, are_sent: bool, telling: Sequence[str]) -> None:
        """Check the labels, and those in the gradients of the tensors named in ``telling``."""
        if (are_sent or telling) and not self.labels:
            raise LabelsNotPermitted(gradients=telling)
        if self.labels and not are_sent and not telling:
            raise UsageError("--send-labels: this cut does not send the labels; leave it out")
        if telling:
            _log.warning(
                "the server can compute the labels from the gradient of %s, as --send-labels "
                "permits: the client has no layer of weights between it and the loss",
                quote(telling),
            )


def _list_raw(prepared: PreparedModel) -> set[str]:
    """Return the names of all inputs of both forms of a prepared model."""
    forms = (prepared.training, prepared.inference)
    return {value.name or "" for form in forms for value in form.graph.inputs}


def find_raw_inputs(
    joint: JointGraph,
    raw: set[str],
    prepared: PreparedModel,
    held: Mapping[str, frozenset[str]],
) -> dict[str, list[str]]:
    """Map each sent tensor that holds raw data to the names of the inputs that the data come from.

    A tensor holds raw data of an input if it is this input, or is computed from it along a path
    without a layer of weights, even if other paths have one.  Only tensors that the client sends
    are listed, including gradients.  Tensors that hold only sizes are not listed.  ``raw`` names
    the raw inputs.  ``held`` maps states to the raw inputs of earlier steps that they hold.
    """
    bare = trace_raw_inputs(joint.graph, raw, prepared, held)
    found: dict[str, list[str]] = {}
    for wire in joint.wires:
        if wire.crossing.sender == CLIENT and bare.get(wire.crossing.value):
            name = wire.tensor.name.removesuffix(f"@{wire.crossing.receiver}")
            found[name] = sorted(bare[wire.crossing.value])
    return found


def sends_labels(joint: JointGraph, inputs: set[str]) -> bool:
    """Return whether the client sends the labels.

    ``inputs`` names the inputs of the model; the labels are the data that are not among them.
    """
    labels = {name for name in joint.data if name not in inputs}
    sent = [wire for wire in joint.wires if wire.kind is WireKind.INPUT]
    return any(wire.tensor.name.rpartition("@")[0] in labels for wire in sent)


def find_labels_in_gradients(joint: JointGraph) -> list[str]:
    """List the tensors for which the gradients sent by the client reveal the labels to the server.

    The server knows the tensor itself, so it can compute the labels from such a gradient.
    """
    return [w.tensor.name.removesuffix(f"@{CLIENT}_grad") for w in joint.wires if w.tells_labels]


def cut(
    model: ModelSource | ir.Model,
    *,
    at: str | Sequence[str] | None,
    tail_at: str | Sequence[str] = (),
    loss: LossSource = CROSS_ENTROPY,
    output: str | None = None,
    optimizer: Optimizer | None = None,
    batchnorm: BatchNormModes = None,
    dropout: DropoutMode | None = None,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    dims: Mapping[str, int | str] | None = None,
    bind: Mapping[str, Binding] | None = None,
    ties: Sequence[tuple[str, str]] = (),
    stop_gradients: str | Sequence[str] = (),
    states: Pairs = (),
    dequantize: bool = False,
    class_axis: int | None = None,
    labels: str = LABELS,
    client_target: Target = TRAINING,
    server_target: Target = TRAINING,
    send_inputs: Sequence[str] = (),
    send_labels: bool = False,
    check: bool | None = None,
    wire: str | Mapping[str, str] | None = None,
    recompute: Recompute | bool = False,
) -> Bundle:
    """Cut a model into a client part and a server part, ready for training.

    Raw inputs leave the client only if ``send_inputs`` names them, and labels only if
    ``send_labels`` is true.

    Args:
        model: a path, the bytes of an ONNX model, or a loaded model.  An ``onnx.ModelProto`` is not
            changed.  An ``onnx_ir`` model is changed and must not be used afterwards; it is assumed
            to be valid.
        at: the tensors that the client sends to the server, given as tensor names, node names or
            glob patterns.  The nodes before these tensors are the client's head.  If ``at`` is
            ``None``, the model is not cut, for training without a server.
        tail_at: the tensors that the server sends back to the client in a U-shaped cut.  The
            client then also has the nodes after these tensors, the loss and the labels.
        loss: ``cross-entropy``, ``mse``, ``l1``, ``bce-with-logits``, or ``from-model`` if
            ``output`` is itself the loss; the path of an ``.onnx`` file of one's own that computes
            it; a :class:`Loss`, which has settings such as label
            smoothing; or several of them, which are added up.
        output: the model output from which the loss is computed, unless the loss names its own;
            by default the first float output.
        optimizer: the optimizer that updates the parameters; by default ``AdamW(lr=1e-3)``.
        batchnorm: ``train`` normalizes with batch statistics and updates the running statistics,
            ``frozen`` uses the running statistics; by default each node's own setting applies.  A
            dictionary maps regular expressions for the names of nodes and of their tensors to
            modes; the last one that matches a node applies.
        dropout: ``keep`` turns every Dropout on, ``off`` turns every Dropout off; by default each
            node's own setting applies.
        train: regular expressions for the names of parameters to train.  An expression that matches
            no parameter selects constants, which then become parameters.  ``train`` takes
            precedence over ``freeze``.
        freeze: regular expressions for the names of parameters that keep their values.
        dims: new sizes of the model's inputs, by symbol or by an axis written as ``input:axis``.  A
            size is a number, or a symbol, which makes a fixed size variable.  A model that then
            mixes the samples of a batch is refused, unless ``check`` is ``False``.
        bind: a dictionary from names of inputs to constant values, such as a sampling rate.  A
            value is one number for all elements, or one for each element.  The data then need not
            contain these inputs.
        ties: pairs of parameters that are trained as one.  Both must have equal values, or one must
            be the transpose of the other.  The first replaces the second.
        stop_gradients: the tensors through which no gradient passes, named as in ``at``.
        states: pairs of an output and an input, or a dictionary from outputs to inputs.  After each
            training step, the output's value replaces the input's, which starts at zeros or at the
            input's initial value, and is not part of the data.  No gradient passes from step to
            step.  Predictions read the value and do not replace it.
        dequantize: whether to replace the integer arithmetic of a quantized model, as
            ``onnxruntime.quantization`` writes it, by arithmetic with floats, which can be trained.
            A log message says what was replaced and by how much results changed.
        class_axis: the axis of ``output`` that holds the classes for ``cross-entropy``; by default
            axis 1, or the last axis if its size is known and that of axis 1 is not.
        labels: the name of the labels in the data, unless the loss names its own.
        client_target, server_target: ``training`` keeps ONNX Runtime's fused gradient kernels;
            ``portable`` uses only standard ONNX operators, for stock ONNX Runtime.
        send_inputs: the names of the raw inputs that may leave the client.  An input is sent
            raw if it is in ``at``, or if a tensor in ``at`` is computed from it without a layer of
            weights.
        send_labels: whether the labels may leave the client.  A cut without ``tail_at`` requires
            this, because the server then computes the loss.  So does a cut whose tail has no layer
            of weights, because the server could then compute the labels from the gradient.
        check: whether to compare the cut model with the original on random inputs.  The expected
            results come from onnx's reference evaluator and from ONNX Runtime without
            optimizations.  Small differences, and whatever cannot be compared, are logged as
            warnings.  By default, models with up to 64 MiB of weights are compared, unless the
            environment variable ``SPLITONNX_NO_CHECK`` is set to 1.  An ``onnx_ir`` model cannot be
            compared, because cutting changes it.
        wire: the codecs of what crosses the cut: ``fp32``, ``fp16``, ``bf16``, ``int8``, ``int4``,
            ``topk=0.1`` or ``randtopk=0.1``, for activations and gradients alike, or for each its
            own, as ``fwd=int8,bwd=bf16`` or a dictionary.  Predictions use the forward codec, too.
            ``bwd=topk=0.1+ef`` adds what a gradient's codec leaves out to the gradient of the next
            step, which takes a fixed batch.
            By default tensors are sent as they are.  What is compared with the original are the
            parts without codecs; a warning says by how much the codec changes predictions.
        recompute: ``client``, ``server`` or ``both`` (``True``): whose forward stage runs again
            before its backward stage, with the same results, in place of keeping between the two
            what the gradients are computed from.  This takes the time of one more forward stage.

    Returns:
        The bundle, in memory; ``bundle.save(folder)`` writes it to disk.

    Raises:
        ModelError: the model cannot be read, prepared or differentiated, or it mixes the samples of
            a batch that ``dims`` freed.
        CutError: the tensors do not exist or do not divide the model, or raw inputs or labels
            would leave the client without permission.
        UsageError: arguments contradict each other.
        ForbiddenOperator: an internal error; the bundle would not run.
        DifferentResult: an internal error; the parts compute other results than the model.
    """
    start()  # so that it is ready when the model has been read
    named = (send_inputs,) if isinstance(send_inputs, str) else tuple(send_inputs)
    codecs = read_wire(wire)
    made = partitions.cut(
        model,
        at=at,
        tail_at=tail_at,
        loss=loss,
        output=output,
        optimizer=optimizer,
        batchnorm=batchnorm,
        dropout=dropout,
        train=train,
        freeze=freeze,
        dims=dims,
        bind=bind,
        ties=ties,
        stop_gradients=stop_gradients,
        states=states,
        dequantize=dequantize,
        class_axis=class_axis,
        labels=labels,
        client_target=client_target,
        server_target=server_target,
        check=check,
        approve=Permission(inputs=named, labels=send_labels),
    )
    encoded = encode_crossings(made, codecs)
    is_checked = check is not False and (check or os.environ.get(partitions.NO_CHECK) != "1")
    if encoded is not made and is_checked:
        for remark in describe_codec_error(made, encoded, str(codecs), partial(merge, made)):
            _log.warning("%s", remark)
    return recompute_stages(encoded, recompute)
