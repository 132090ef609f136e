"""Find out what an exporter did to a model, and what this means for training.

Some changes cannot be detected with certainty: for example, a folded BatchNormalization leaves no
trace.  So the remarks describe what can be seen, such as nodes and the exporter's name, and what
this means for training.  This module never refuses a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir

from splitonnx.partitioner.gate import fused_operators
from splitonnx.partitioner.gate.exporters import (
    CALL,
    Omission,
    computes_statistics,
    describe_call,
    is_from_torch,
    list_omissions,
)
from splitonnx.partitioner.gate.ml_operators import DOMAIN
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.traversals import list_nodes
from splitonnx.partitioner.lowerings.integer_kernels import describe_saturation, list_saturating
from splitonnx.partitioner.normalization.batchnorms import is_training, list_batchnorms
from splitonnx.partitioner.normalization.dequantized.stored import (
    describe_stored_integers,
    find_stored_integers,
)
from splitonnx.partitioner.normalization.dequantized.untrained import (
    describe_untrained_integers,
    find_untrained_integers,
)
from splitonnx.partitioner.reports.remarks import Kind, Remark

_CALLS = {
    "pytorch": f"export it again with {CALL}",
    "tf2onnx": "Keras has no export that keeps it; train without, or export from the torch backend",
    "jax2onnx": "jax2onnx keeps BatchNorm where the module has one",
}
"""Map exporters to advice on how to export a model without folding its BatchNormalizations."""
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_FEWEST_CONVOLUTIONS = 8
"""Number of convolutions from which on a model without normalization leads to a remark.

Networks with so many convolutions are rarely trained without normalization.
"""
_NORMALIZATIONS = frozenset(
    {"BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"}
)


@attribute_errors_to_pass("searched for what is missing from its training")
def diagnose(model: ir.Model) -> list[Remark]:
    """List remarks on what an exporter did to a model and what this means for training.

    Pass the model as it was read from the file, before it is prepared.
    """
    omissions = list_omissions(model)
    found = [remark for look in _LOOKS for remark in look(model)]
    kinds = {remark.kind for remark in found}
    found += [_report(one) for one in omissions if Kind(one.kind) not in kinds | {Kind.FIXED_BATCH}]
    if omissions or (Kind.NO_BATCHNORM in kinds and is_from_torch(model)):
        found.append(_report_call(model, omissions))
    return found


def _report(omission: Omission) -> Remark:
    return Remark(
        kind=Kind(omission.kind),
        sentence=f"{omission.sentence}; export it again with {CALL}",
        names=omission.names,
    )


def _report_call(model: ir.Model, omissions: Sequence[Omission]) -> Remark:
    """Return a remark with the call of PyTorch's own exporter that leaves out nothing."""
    call = describe_call(model, {omission.kind for omission in omissions})
    return Remark(
        kind=Kind.EXPORT_CALL,
        sentence=f"{CALL} makes and checks the call of PyTorch's exporter that keeps all of this; "
        f"by hand, it is {call}",
    )


def _advise(model: ir.Model) -> str:
    advice = _CALLS.get((model.producer_name or "").lower())
    return f"; {advice}" if advice else ""


def _name_producer(model: ir.Model) -> str:
    words = [model.producer_name or "an unnamed exporter", model.producer_version or ""]
    return " ".join(word for word in words if word)


def _miss_batchnorms(model: ir.Model) -> Iterator[Remark]:
    kinds = [node.op_type for node in list_nodes(model.graph)]
    convolutions = sum(kind in _CONVOLUTIONS for kind in kinds)
    if convolutions < _FEWEST_CONVOLUTIONS or _NORMALIZATIONS & set(kinds):
        return
    yield Remark(
        kind=Kind.NO_BATCHNORM,
        sentence=f"the model has {convolutions} convolutions and no normalization: if the network "
        f"had one, {_name_producer(model)} folded it into them, and it is not trained"
        f"{_advise(model)}",
    )


def _find_frozen(model: ir.Model) -> Iterator[Remark]:
    frozen = [
        node
        for node in list_batchnorms(model.graph)
        if not is_training(node) and not computes_statistics(node)
    ]
    if frozen:
        yield Remark(
            kind=Kind.FROZEN_BATCHNORM,
            sentence=f"{len(frozen)} BatchNormalization nodes are in inference mode: they "
            "normalise by their running statistics, which stay as they are; train with "
            "--batchnorm train to normalise by the batch"
            f"{', or ' + _CALLS['pytorch'] if is_from_torch(model) else ''}",
        )


def _find_idle_dropouts(model: ir.Model) -> Iterator[Remark]:
    idle = [n for n in model.graph if n.op_type == "Dropout" and not n.domain and not _is_on(n)]
    if idle:
        yield Remark(
            kind=Kind.DROPOUT_OFF,
            sentence=f"{len(idle)} Dropout nodes are off, as at inference; train with "
            "--dropout keep to turn them on",
        )


def _is_on(node: ir.Node) -> bool:
    """Return whether a Dropout may be on: its third input exists and is not known to be false."""
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None:
        return False
    known = ir.convenience.get_const_tensor(mode)
    return known is None or bool(known.numpy().any())


def _find_quantized(model: ir.Model) -> Iterator[Remark]:
    count = sum(node.op_type == "QuantizeLinear" for node in list_nodes(model.graph))
    if count:
        yield Remark(
            kind=Kind.QUANTIZED,
            sentence=f"the model is quantized in {count} places; gradients pass straight through "
            "the rounding (docs/quantization.md)",
        )


def _find_stored_integers(model: ir.Model) -> Iterator[Remark]:
    if stored := find_stored_integers(model.graph):
        yield Remark(
            kind=Kind.STORED_INTEGERS,
            sentence=describe_stored_integers(stored),
            names=tuple(stored),
            options=("--dequantize",),
        )


def _find_untrained_integers(model: ir.Model) -> Iterator[Remark]:
    if found := find_untrained_integers(model.graph):
        yield Remark(
            kind=Kind.UNTRAINED_INTEGERS,
            sentence=describe_untrained_integers(found),
            names=tuple(found),
        )


def _find_saturating(model: ir.Model) -> Iterator[Remark]:
    if (sentence := describe_saturation(model.graph)) is not None:
        names = tuple(list_saturating(model.graph))
        yield Remark(kind=Kind.SATURATION, sentence=f"once merged: {sentence}", names=names)


def _find_dictionaries(model: ir.Model) -> Iterator[Remark]:
    kinds = sorted({node.op_type for node in model.graph if node.domain == DOMAIN})
    if kinds:
        yield Remark(
            kind=Kind.DICTIONARIES,
            sentence=f"{', '.join(kinds)} of {DOMAIN} are written in standard operators; an output "
            "of dictionaries becomes the tensor of probabilities",
        )


def _find_optimized(model: ir.Model) -> Iterator[Remark]:
    nodes = [node for node in list_nodes(model.graph) if node.domain == fused_operators.DOMAIN]
    if nodes:
        kinds = ", ".join(sorted({node.op_type for node in nodes}))
        yield Remark(
            kind=Kind.OPTIMIZED,
            sentence=f"the model was optimized by ONNX Runtime: {len(nodes)} nodes ({kinds}) are "
            "written in standard operators, also in the merged model",
        )


_LOOKS: Sequence[Callable[[ir.Model], Iterator[Remark]]] = (
    _miss_batchnorms,
    _find_frozen,
    _find_idle_dropouts,
    _find_quantized,
    _find_stored_integers,
    _find_untrained_integers,
    _find_saturating,
    _find_dictionaries,
    _find_optimized,
)
