"""Which metrics a user asks for, and which output of the model each of them is computed from.

The manifest says which outputs are compared with labels, and how the labels are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitonnx.errors import UsageError
from splitonnx.manifests import PartyManifest, ScoredOutput, ScoreKind
from splitonnx.names import EVALUATE, SCORES
from splitonnx.tensors import TensorSpec

_CLASSES, _BINARY, _VALUES = ScoreKind.CLASSES, ScoreKind.BINARY, ScoreKind.VALUES
_SUITABLE = {
    "accuracy": (_CLASSES, _BINARY),
    "f1": (_CLASSES, _BINARY),
    "precision": (_CLASSES, _BINARY),
    "recall": (_CLASSES, _BINARY),
    "auc": (_CLASSES, _BINARY),
    "top": (_CLASSES,),
    "perplexity": (_CLASSES,),
    "mae": (_VALUES,),
    "mse": (_VALUES,),
    "rmse": (_VALUES,),
}
_LOSSES = {_CLASSES: "cross-entropy", _BINARY: "bce-with-logits", _VALUES: "mse or l1"}
_AVERAGED = ("f1", "precision", "recall")
_AVERAGES = ("macro", "micro", "weighted")
METRICS = (
    "accuracy, top-K (such as top-5), f1, precision, recall (each also with -macro, -micro or "
    "-weighted), auc, perplexity, mae, mse, rmse"
)
"""The metrics, as help texts and error messages name them."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric of one output.

    ``name`` is the text that the user wrote, under which the number is reported.  ``kind`` is the
    metric without its settings: ``k`` of ``top-k``, and ``average`` of ``f1-macro``, which is empty
    if the user named none.  ``size`` is the number of classes, or of questions that are answered
    with yes or no, or of values, and is 1 if the sizes behind the batch are not that.
    """

    name: str
    kind: str
    source: ScoredOutput
    size: int
    k: int = 1
    average: str = ""


def choose_metrics(names: Sequence[str], manifest: PartyManifest) -> tuple[Metric, ...]:
    """Return the metrics of these names; without names there are none.

    A name is such as ``f1``.  If there are several losses, ``f1.NAME`` is computed from the output
    of the loss that is reported as ``loss.NAME``; without it, one of them only may fit the metric.

    Raises:
        UsageError: there is no such metric, or it does not fit the losses.
    """
    if isinstance(names, str):
        raise UsageError(f"metrics is a list of names, such as ['{names}'], not a text")
    return tuple(_choose(name, manifest) for name in dict.fromkeys(names))


def _choose(name: str, manifest: PartyManifest) -> Metric:
    base, _, loss = name.partition(".")
    kind, dash, setting = base.partition("-")
    is_counted = kind == "top" and setting.isascii() and setting.isdecimal() and int(setting) > 0
    is_averaged = kind in _AVERAGED and setting in _AVERAGES
    is_plain = kind != "top" and kind in _SUITABLE and not dash
    if not (is_counted or is_averaged or is_plain):
        raise UsageError(f"there is no metric '{name}'; choose from {METRICS}")
    source = _find_source(name, base, loss, kind, manifest)
    known = (*manifest.outputs, *manifest.phase(EVALUATE).data)
    spec = next((one for one in known if one.name == source.output), None)
    size = 1 if spec is None else _find_size(source, spec)
    k = int(setting) if is_counted else 1
    if is_counted and k >= size:
        output = source.output.removeprefix(SCORES)
        raise UsageError(
            f"the metric {name} is always 1, because '{output}' has {size} classes; choose "
            "a smaller number"
        )
    average = setting if is_averaged else ""
    return Metric(name=name, kind=kind, source=source, size=size, k=k, average=average)


def _find_source(
    name: str, base: str, loss: str, kind: str, manifest: PartyManifest
) -> ScoredOutput:
    if not manifest.scored:
        raise UsageError(
            f"the metric {name} needs an output that a loss of splitonnx compares with labels "
            f"({', '.join(_LOSSES.values())}); this bundle has none, or is of an earlier version: "
            "cut the model again"
        )
    fitting = [one for one in manifest.scored if one.kind in _SUITABLE[kind]]
    if not fitting:
        raise UsageError(
            f"the metric {name} is for {' and '.join(_LOSSES[k] for k in _SUITABLE[kind])}; this "
            f"bundle has {' and '.join(dict.fromkeys(_LOSSES[s.kind] for s in manifest.scored))}"
        )
    chosen = [one for one in fitting if one.loss == loss] if loss else fitting
    if len(chosen) != 1:
        choices = ", ".join(f"{base}.{one.loss}" if one.loss else base for one in fitting)
        said = "may mean several outputs" if not loss else "names no loss that it fits"
        raise UsageError(f"the metric {name} {said}; choose from {choices}")
    return chosen[0]


def _find_size(source: ScoredOutput, spec: TensorSpec) -> int:
    """Return how many numbers belong together: on the axis of classes, or in a matrix's columns."""
    axis = source.class_axis
    if axis is None and len(spec.shape) != 2:
        return 1
    size = spec.shape[1 if axis is None else axis]
    return size if isinstance(size, int) else 1
