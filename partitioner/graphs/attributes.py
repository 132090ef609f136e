"""Check attributes once, so that later steps can rely on their presence and type.

onnx's checker does not check everything in bodies and functions, in particular not references to
attributes, which are valid only in a function.  After this check, each attribute has its operator's
type and the required ones are present.  Attribute values are checked by the code that uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import onnx
import onnx_ir as ir

from splitonnx.errors import NotAModel


def check_attributes(graph: ir.Graph, opset: int) -> None:
    """Check the attributes of every node, including nodes in bodies, against its schema.

    Functions must be inlined already.  A node without its own version belongs to ``opset``.

    Raises:
        NotAModel: an attribute refers to a function's attribute outside a function, has another
            type than its operator requires, or is missing.
    """
    for node in graph.all_nodes():
        declared = _find_attributes(node, node.version or opset)
        for name, attribute in node.attributes.items():
            if attribute.is_ref():
                _refuse(node, f"its attribute '{name}' refers to one that no function has")
            if declared is None or name not in declared:
                continue
            kind: Any = declared[name].type  # an enumeration, which onnx's stubs do not know
            wanted = kind.value
            if attribute.type.value != wanted:
                kinds = onnx.AttributeProto.AttributeType
                _refuse(node, f"its attribute '{name}' is not {kinds.Name(wanted)}")
        for name, expected in (declared or {}).items():
            if expected.required and name not in node.attributes:
                _refuse(node, f"it has no attribute '{name}'")


_Attributes = Mapping[str, onnx.defs.OpSchema.Attribute]


def _find_attributes(node: ir.Node, version: int) -> _Attributes | None:
    """Return the attributes of the operator if it is in ONNX's own domain."""
    return _list_attributes(node.op_type, version) if node.domain in ("", "ai.onnx") else None


@lru_cache(maxsize=1 << 10)
def _list_attributes(kind: str, version: int) -> _Attributes | None:
    try:
        return dict(onnx.defs.get_schema(kind, version, "").attributes)
    except onnx.defs.SchemaError:
        return None


def _refuse(node: ir.Node, reason: str) -> None:
    raise NotAModel(f"node '{node.name}' ({node.op_type})", reason)
