"""Check, before a graph is written, that the runtime's gate will accept its operators.

Only names, domains and versions of operators are compared with the gate's table.  A mistake in an
earlier step is thus found when a model is cut, not when its bundle is run.
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
    """Check every operator of a stage's graph and of its bodies; return the domains in use.

    A portable graph may use standard operators only.

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
