"""Opsets and IR versions: every model is brought to what onnxruntime-training takes.

It knows how operators changed from one opset to the next; it knows no training and no cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel

LOWEST_OPSET, HIGHEST_OPSET = 18, 21
"""Dropout's mask needs BitwiseXor (18); onnxruntime 1.19.2 ends at 21."""
IR_VERSION = 10


def adapt_opset(model: ir.Model) -> ir.Model:
    """Bring a model to opset 18 to 21 and IR version 10.

    Where no operator changed on the way only the number is set; else onnx's converter is asked.
    """
    model.ir_version = IR_VERSION
    version = model.graph.opset_imports.get("", 1)
    target = min(max(version, LOWEST_OPSET), HIGHEST_OPSET)
    if target == version:
        return model
    changed = sorted({n.op_type for n in _all_nodes(model) if _changes(n, version, target)})
    if changed:
        model = _convert(model, target, changed)
        model.ir_version = IR_VERSION
    model.graph.opset_imports[""] = target
    for node in _all_nodes(model):
        node.version = None
    return model


def _all_nodes(model: ir.Model) -> list[ir.Node]:
    return list(model.graph.all_nodes())


def _changes(node: ir.Node, version: int, target: int) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    try:
        schemas = [onnx.defs.get_schema(node.op_type, v, "") for v in (version, target)]
    except onnx.defs.SchemaError:
        return True
    return schemas[0].since_version != schemas[1].since_version


def _convert(model: ir.Model, target: int, changed: Sequence[str]) -> ir.Model:
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(model), target)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnsupportedModel(
            f"operators {', '.join(changed)} of opset {model.graph.opset_imports.get('')}",
            f"they cannot be brought to opset {target} ({str(error).strip().splitlines()[0]})",
            f"export the model with opset {LOWEST_OPSET} to {HIGHEST_OPSET}",
        ) from error
    return ir.from_proto(proto)
