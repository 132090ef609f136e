"""The last look at a graph before it is written: would the runtime's gate let its operators pass?

What the steps before make of a model is theirs; here only names, domains and versions of operators
are held against the table that the gate has, so that a mistake shows when a model is cut and not
when its bundle is run.
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
    """Check every operator of a stage's graph, those in bodies too; return the domains in use.

    A portable graph has standard operators alone.

    Raises:
        ForbiddenOperator: the party's runtime would refuse one.
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
