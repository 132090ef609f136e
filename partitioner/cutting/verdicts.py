"""Check that the runtime will accept a graph's operators, before the graph is written.

The runtime refuses operators that its table does not list.  This module compares names, domains and
versions with the same table.  So a mistake in an earlier step is found when the model is cut, and
not only when the bundle is run.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.errors import ForbiddenOperator
from splitonnx.operators import (
    HIGHEST_OPSET,
    HIGHEST_TRAINING_OPSET,
    STANDARD_DOMAINS,
    TRAINING_DOMAIN,
    is_known,
    is_standard,
)
from splitonnx.partitioner.graphs.traversals import list_bodies

_HIGHEST = {"": HIGHEST_OPSET, TRAINING_DOMAIN: HIGHEST_TRAINING_OPSET}


def check_operators(
    stage: str, graph: ir.Graph | ir.GraphView, *, is_portable: bool
) -> frozenset[str]:
    """Check all operators in a stage's graph and its subgraph bodies, and return their domains.

    ``stage`` names the stage in error messages.  A portable graph may use only standard operators.

    Raises:
        ForbiddenOperator: the party's runtime would refuse an operator.
    """
    passed: set[tuple[str, str]] = set()
    pending: list[ir.Graph | ir.GraphView] = [graph]
    while pending:
        for node in pending.pop():
            key = (node.op_type, node.domain)
            if key not in passed:
                domain = "" if node.domain in STANDARD_DOMAINS else node.domain
                version = graph.opset_imports.get(domain, 0)
                known = is_standard(*key) if is_portable else is_known(*key)
                if not known or not 1 <= version <= _HIGHEST[domain]:
                    raise ForbiddenOperator(stage, node.name or "", *key, version)
                passed.add(key)
            pending.extend(list_bodies(node))
    return frozenset(domain for _, domain in passed)
