"""Check that nodes have the attributes that their operators require, with the right types.

onnx's own checker skips some of these checks in subgraph bodies and functions.  For example, it
accepts references to a function's attributes in nodes outside functions.  Later steps can rely on
the checks here; the values of attributes are checked by the code that uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import onnx
import onnx_ir as ir

from splitonnx.errors import NotAModel


def check_attributes(graph: ir.Graph, opset: int) -> None:
    """Check the attributes of every node against the schema of the node's operator.

    Nodes in subgraph bodies are included.  Functions must already be inlined.  ``opset`` is the
    version of nodes that declare no version.

    Raises:
        NotAModel: an attribute is missing, has the wrong type, or refers to a function's attribute
            although the node is outside a function.
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
    """Return the attributes that a node's operator declares.

    Return ``None`` if the operator is not in ONNX's own domain or not known.
    """
    return _list_attributes(node.op_type, version) if node.domain in ("", "ai.onnx") else None


@lru_cache(maxsize=1 << 10)
def _list_attributes(kind: str, version: int) -> _Attributes | None:
    try:
        return dict(onnx.defs.get_schema(kind, version, "").attributes)
    except onnx.defs.SchemaError:
        return None


def _refuse(node: ir.Node, reason: str) -> None:
    raise NotAModel(f"node '{node.name}' ({node.op_type})", reason)
