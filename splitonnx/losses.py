"""Losses as a user names them: which one, of which output, with which arrays and settings.

A :class:`Loss` is a value.  It is passed to ``cut`` and recorded in the bundle's manifest.  The
partitioner turns it into nodes of a graph; the runtime never reads it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from splitonnx.errors import UsageError

CROSS_ENTROPY, FROM_MODEL, FROM_FILE = "cross-entropy", "from-model", "from-file"
MAX_FILE = 4 << 20
"""The largest file of a loss in bytes; it is stored in the manifest of the bundle."""
LABELS = "labels"
"""The usual name of the labels in the data."""


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """A loss and its settings.

    A loss is a mean: the sum of the losses of all labels, each multiplied by its weight, divided by
    the sum of these weights.  If nothing counts, as in a batch whose labels are all ignored, the
    loss and its gradients are 0.

    Attributes:
        kind: ``cross-entropy``, ``mse``, ``l1``, ``bce-with-logits`` or ``from-model``; or the path
            of an ``.onnx`` file.  Its inputs have the names of outputs of the model and of arrays
            in the data, and its only output is the loss, a scalar.
        output: the model output that the loss is computed from; by default the first float output.
        labels: the name of the labels in the data; by default ``labels``.
        class_axis: for ``cross-entropy``, the axis of the output that holds the classes.
        label_smoothing: for ``cross-entropy``, the part of each label that is spread over all
            classes, from 0 to 1, as in PyTorch's ``CrossEntropyLoss``.
        class_weights: for ``cross-entropy``, a weight for each class.
        ignore_index: for ``cross-entropy``, the value of labels that do not count, neither in the
            loss nor in the metric.
        sample_weights: the name of an array with one float32 for each sample.  It weighs all labels
            of the sample, in the loss and in the metric.
        weight: the factor of this loss in the sum, if there are several.
        name: the name that this loss is reported under, if there are several; by default the
            output's name.
        graph: the content of the ``.onnx`` file, for the kind ``from-file``.
    """

    kind: str = CROSS_ENTROPY
    output: str | None = None
    labels: str | None = None
    class_axis: int | None = None
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    ignore_index: int | None = None
    sample_weights: str | None = None
    weight: float = 1.0
    name: str | None = None
    graph: bytes | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UsageError: a number is out of range.
        """
        if not 0 <= self.label_smoothing <= 1:
            raise UsageError(f"label_smoothing must be from 0 to 1, not {self.label_smoothing:g}")
        if not (math.isfinite(self.weight) and self.weight):
            raise UsageError(f"a loss's weight must be finite and not 0, not {self.weight:g}")
        if self.ignore_index is not None and not -(2**31) <= self.ignore_index < 2**31:
            raise UsageError(f"ignore_index must be an int32, not {self.ignore_index}")
        if (self.kind == FROM_FILE) != (self.graph is not None):
            raise UsageError(f"a loss {FROM_FILE} has a graph, the bytes of a model, and no other")
        if self.graph is not None and len(self.graph) > MAX_FILE:
            raise UsageError(f"a loss's file has at most {MAX_FILE >> 20} MiB")
        if not all(0 <= weight < math.inf for weight in self.class_weights):
            raise UsageError("class_weights must be finite and at least 0")
        if self.class_weights and not any(self.class_weights):
            raise UsageError("class_weights are all 0, so nothing would be trained")

    @property
    def weighs(self) -> bool:
        """Return whether labels may count unequally, or not at all."""
        settings = (self.class_weights or None, self.ignore_index, self.sample_weights)
        return any(setting is not None for setting in settings)

    @property
    def array(self) -> str:
        """Return the name of the labels in the data."""
        return LABELS if self.labels is None else self.labels


LossSource: TypeAlias = str | Loss | Sequence[str | Loss]
"""Losses as users give them: a name, a value with settings, or several."""


def complete_losses(
    source: LossSource, output: str, class_axis: int | None, labels: str
) -> tuple[Loss, ...]:
    """Return losses with the output, class axis and labels that they leave open, and with names.

    A loss keeps what it says itself.  ``class_axis`` is for the losses that have classes.

    Raises:
        UsageError: there is no loss, two have the same name, or a single one has a weight.
    """
    given = [source] if isinstance(source, str | Loss) else list(source)
    losses = [_read(Loss(kind=one) if isinstance(one, str) else one) for one in given]
    if not losses:
        raise UsageError("there is no loss; name one, such as cross-entropy")
    has_classes = any(loss.kind == CROSS_ENTROPY for loss in losses)
    has_labels = any(loss.kind not in (FROM_MODEL, FROM_FILE) for loss in losses)
    completed = []
    for loss in losses:
        axis = class_axis if loss.kind == CROSS_ENTROPY or not has_classes else None
        array = None if labels == LABELS else labels
        if has_labels and loss.kind in (FROM_MODEL, FROM_FILE):
            array = None
        completed.append(
            msgspec.structs.replace(
                loss,
                output=loss.output if loss.kind == FROM_FILE else loss.output or output,
                class_axis=axis if loss.class_axis is None else loss.class_axis,
                labels=array if loss.labels is None else loss.labels,
            )
        )
    if len(completed) == 1:
        if completed[0].weight != 1:
            raise UsageError("a single loss has no weight; choose another learning rate")
        return (msgspec.structs.replace(completed[0], name=None),)
    return _name_losses(completed)


def _read(loss: Loss) -> Loss:
    """Read the file that a loss's kind names, if it names one.

    Raises:
        UsageError: the file cannot be read, or is too large.
    """
    path = Path(loss.kind)
    if path.suffix != ".onnx":
        return loss
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise UsageError(f"--loss {path}: {error.strerror or error}") from error
    name = loss.name or path.stem
    return msgspec.structs.replace(loss, kind=FROM_FILE, graph=content, name=name)


def _name_losses(losses: Sequence[Loss]) -> tuple[Loss, ...]:
    """Give each loss a name: the output's, or the output's and the kind's if it has several."""
    shared = Counter(loss.output for loss in losses)
    named = tuple(
        msgspec.structs.replace(
            loss,
            name=loss.name
            or (loss.output if shared[loss.output] == 1 else f"{loss.output}.{loss.kind}"),
        )
        for loss in losses
    )
    twice = [name for name, count in Counter(loss.name for loss in named).items() if count > 1]
    if twice:
        raise UsageError(
            f"two losses would be reported as '{twice[0]}'; give each a name of its own"
        )
    return named


def is_plain(losses: Sequence[Loss]) -> bool:
    """Return whether the losses are one, without any setting but output, labels and class axis."""
    first, *others = losses
    if first.graph is not None:
        return False
    plain = Loss(
        kind=first.kind, output=first.output, labels=first.labels, class_axis=first.class_axis
    )
    return not others and first == plain
