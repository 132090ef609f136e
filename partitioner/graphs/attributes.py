"""Attributes: what the work on a model relies on when it reads them, checked once.

onnx's checker lets pass what is in bodies and functions, references above all, which mean
something only where a function is called.  Behind this, each attribute is of its operator's type
and the required ones are there.  Their values are checked where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import onnx
import onnx_ir as ir

from splitonnx.errors import NotAModel


def check_attributes(graph: ir.Graph, opset: int) -> None:
    """Check the attributes of every node, those in bodies included, against its schema.

    Functions are inlined.  A node without a version of its own is of ``opset``.

    Raises:
        NotAModel: an attribute refers to that of no function, is of another type than its
            operator's, or is missing.
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
    """Return the attributes of the operator, where ONNX itself has it."""
    return _list_attributes(node.op_type, version) if node.domain in ("", "ai.onnx") else None


@lru_cache(maxsize=1 << 10)
def _list_attributes(kind: str, version: int) -> _Attributes | None:
    try:
        return dict(onnx.defs.get_schema(kind, version, "").attributes)
    except onnx.defs.SchemaError:
        return None


def _refuse(node: ir.Node, reason: str) -> None:
    raise NotAModel(f"node '{node.name}' ({node.op_type})", reason)
