"""Step functions: constant between their jumps, so their gradient is zero wherever it exists."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.drafts import Draft


def rewrite_step(draft: Draft, node: ir.Node) -> Sequence[ir.Value]:
    """The operator itself on inputs that no gradient leaves: Ceil, Floor, Round, Sign, ..."""
    inputs = [value if value is None else draft.detach(value) for value in node.inputs]
    return draft.ops(node.op_type, inputs, len(node.outputs), dict(node.attributes))
