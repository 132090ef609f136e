"""Call ``torch.onnx.export`` so that the exported model can be trained.

The legacy exporter is tried first.  Only this exporter keeps BatchNormalization in training mode.
It also writes one operator per layer, takes a tenth of the time, and needs no other package.  It
refuses dropout in recurrent layers, and newer operators.  The dynamo exporter accepts both, but
writes BatchNormalization in inference mode; :mod:`repairs` corrects this afterwards.  Constants are
not folded, because otherwise both exporters lose the names of parameters.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from splitonnx.errors import NotExported, TorchNeeded
from splitonnx.torch.environment import has_onnxscript
from splitonnx.torch.examples import Example
from splitonnx.torch.gradients.detachments import replace_detachments, writing_detachments

OPSET = 18
"""An opset that both exporters write and that needs no conversion for training."""
BATCH = "N"
_REFUSALS = (
    AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What the exporters raise if they cannot export a network; few of these are their own classes."""
_MOST = 4096


@dataclass(frozen=True, kw_only=True)
class Called:
    """An exported model.

    ``exporter`` is the exporter that wrote the model: ``legacy`` or ``dynamo``.  ``detached`` are
    the names of the results of ``detach`` in the model's main graph.
    """

    model: onnx.ModelProto
    exporter: str
    detached: tuple[str, ...]


def call_exporter(
    torch: Any,
    model: Any,
    example: Example,
    outputs: Sequence[str],
    varying: Sequence[str],
    *,
    recurrent_dropout: bool,
) -> Called:
    """Export a network without changing the modes of its modules.

    ``outputs`` are the names for all outputs, and ``varying`` are the names of the outputs that
    have the batch as their first axis.  ``recurrent_dropout`` means that the network applies
    dropout between recurrent layers; the legacy exporter refuses this, so it is not tried.

    Raises:
        NotExported: no exporter that was tried can export the network.
        TorchNeeded: the dynamo exporter is needed, but onnxscript is missing.
    """
    reasons: dict[str, str] = {}
    tried: tuple[Callable[..., onnx.ModelProto], ...] = (_call_legacy, _call_dynamo)
    if recurrent_dropout:
        reasons["legacy"] = "it refuses dropout between recurrent layers in training mode"
        tried = (_call_dynamo,)
    for call in tried:
        name = "dynamo" if call is _call_dynamo else "legacy"
        if name == "dynamo" and not has_onnxscript():
            purpose = "torch.onnx.export(dynamo=True), since the legacy exporter cannot export "
            purpose += f"{type(model).__name__} ({reasons['legacy'][:160]}),"
            raise TorchNeeded(purpose, "onnxscript", "")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", FutureWarning)
                made = call(torch, model, example, outputs, varying)
            return Called(model=made, exporter=name, detached=replace_detachments(made))
        except _REFUSALS as error:
            reasons[name] = _explain(error)
    raise NotExported(type(model).__name__, reasons)


def _explain(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and str(cause):
        lines = [str(cause).splitlines()[0]]
    return lines[0] if lines else type(error).__name__


def _call_legacy(
    torch: Any, model: Any, example: Example, outputs: Sequence[str], varying: Sequence[str]
) -> onnx.ModelProto:
    with writing_detachments(torch, OPSET) as written:
        try:
            return _trace(torch, model, example, outputs, varying)
        except _REFUSALS:
            if not written:
                raise
    return _trace(torch, model, example, outputs, varying)  # it has to read a detached tensor


def _trace(
    torch: Any, model: Any, example: Example, outputs: Sequence[str], varying: Sequence[str]
) -> onnx.ModelProto:
    written = io.BytesIO()
    torch.onnx.export(
        model,
        example.arguments,
        written,
        kwargs=example.keywords or None,
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
        opset_version=OPSET,
        input_names=list(example.tensors),
        output_names=list(outputs),
        dynamic_axes={name: {0: BATCH} for name in (*example.tensors, *varying)},
    )
    return onnx.load_model_from_string(written.getvalue())


def _call_dynamo(
    torch: Any, model: Any, example: Example, outputs: Sequence[str], varying: Sequence[str]
) -> onnx.ModelProto:
    del varying  # found by the exporter itself
    batch = torch.export.Dim(BATCH, min=2, max=_MOST)
    sizes = {name: {0: batch} for name in example.tensors}
    program = torch.onnx.export(
        model,
        example.arguments,
        kwargs=example.keywords or None,
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=OPSET,
        input_names=list(example.tensors),
        output_names=list(outputs),
        dynamic_shapes=sizes if example.is_named else tuple(sizes.values()),
    )
    proto: onnx.ModelProto = program.model_proto
    return proto
