"""Turn the integer arithmetic of a quantized model into arithmetic with floats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import UsageError, list_some
from splitonnx.partitioner.gate.fused_operators import DOMAIN
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import list_nodes, map_values
from splitonnx.partitioner.inference.node_faults import attribute_errors_to
from splitonnx.partitioner.normalization.dequantized import dynamic, static, stored
from splitonnx.partitioner.normalization.dequantized.moved import SPREADING
from splitonnx.partitioner.normalization.dequantized.weights import MOVING, FloatWeights

_Formula = Callable[[NodeBuilder, ir.Node, FloatWeights], Sequence[ir.Value] | None]

DYNAMIC: Mapping[str, _Formula] = {
    "DequantizeLinear": dynamic.write_dequantize,
    "DynamicQuantizeLSTM": dynamic.write_lstm,
    "DynamicQuantizeMatMul": dynamic.write_dynamic_product,
    "MatMulIntegerToFloat": dynamic.write_product,
    "QAttention": dynamic.write_attention,
    "QEmbedLayerNormalization": dynamic.write_embedding,
}
"""Map each operator with a formula that ``quantize_dynamic`` or the optimizer writes to it."""
PRODUCTS = frozenset({"ConvInteger", "MatMulInteger"})
"""Operators whose sums a Cast and a Mul turn into floats."""
_UNPACKED = "MatMulNBits"
_LEFT_OVER = (
    PRODUCTS
    | MOVING
    | SPREADING
    | {
        *("Add", "Cast", "Div", "DynamicQuantizeLinear", "Floor", "Mul", "Sub"),
        *("QuantizeLinear", "ReduceMax", "ReduceMin"),  # what older tools write for it
    }
)
"""Operators that may no longer be needed when products of integers were replaced."""


@dataclass(frozen=True, kw_only=True)
class Dequantization:
    """What was turned: the number of nodes of each operator, and the names of float weights.

    ``chosen`` holds the names of all tensors that have the names of the float model again.
    ``is_dynamic`` is true if activations were rounded by scales computed from the data, and
    ``is_static`` if they were rounded by stored scales.  ``left`` maps weights that are still
    integers, and so not trained, to their number of elements.
    """

    kinds: Mapping[str, int]
    weights: tuple[str, ...]
    chosen: frozenset[str]
    is_dynamic: bool
    is_static: bool
    left: Mapping[str, int]

    def describe(self) -> str:
        """Return a sentence about what was turned and what the merged model will be."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        sentence = f"--dequantize turned {kinds} into arithmetic with floats"
        if self.weights:
            sentence += f"; weights made from integers: {list_some(self.weights)}"
        if self.is_dynamic:
            sentence += (
                "; activations before them are no longer rounded to 8 bits, and these weights "
                "stay floats in the merged model"
            )
        if self.is_static:
            sentence += (
                "; activations are still rounded with the stored scales, and the merged model is "
                "in QDQ form"
            )
        if self.weights and not (self.is_dynamic or self.is_static):
            sentence += "; they stay floats in the merged model"
        if self.left:
            sentence += f"; {stored.count_stored_integers(self.left)}"
        return sentence


def dequantize(model: ir.Model, *, is_rounding: bool = False) -> Dequantization:
    """Replace the integer arithmetic of a model by arithmetic with floats, in place.

    If ``is_rounding`` is true, activations are still rounded where the model does so, also with
    scales that it computes.  Functions must have been inlined.

    Raises:
        UnsupportedModel: an operator cannot be replaced.
        UsageError: the model does not compute with integers.
    """
    values = [value for graph in model.graphs() for value in map_values(graph).values()]
    weights = FloatWeights(
        is_rounding=is_rounding,
        taken={value.name or "" for value in values},
        is_static=any(node.op_type in static.FORMULAS for node in list_nodes(model.graph)),
    )
    kinds: Counter[str] = Counter()
    for node in list_nodes(model.graph):
        with attribute_errors_to(node, "turned into arithmetic with floats"):
            if _replace(node, weights):
                kinds[node.op_type] += 1
    for node in list_nodes(model.graph):
        with attribute_errors_to(node, "turned into a float weight"):
            if stored.replace_unscaled(node, weights):
                kinds[node.op_type] += 1
    if not kinds:
        raise UsageError(
            "--dequantize is for models that compute with integers or scale stored ones, and this "
            "one does not; leave it out (models in QDQ form are trained as they are)"
        )
    for graph in model.graphs():
        _drop_left_over(graph)
    return Dequantization(
        kinds=dict(kinds),
        weights=tuple(weights.names),
        chosen=frozenset(weights.chosen),
        is_dynamic=any(_is_dynamic(kind, weights) for kind in kinds),
        is_static=any(kind in static.FORMULAS or kind in static.DIRECT for kind in kinds),
        left=stored.find_stored_integers(model.graph),
    )


def _is_dynamic(kind: str, weights: FloatWeights) -> bool:
    if kind == "DequantizeLinear" and weights.is_static:
        return False
    return kind in PRODUCTS or kind in DYNAMIC


def _replace(node: ir.Node, weights: FloatWeights) -> bool:
    kind = node.op_type
    if node.domain not in ("", DOMAIN):
        return False
    if kind == _UNPACKED:  # replaced by quantizations.lift_quantized in every case
        return True
    if kind == "Mul" and not node.domain:
        return stored.replace_scaled(node, weights)
    if kind in PRODUCTS and not node.domain:
        dynamic.replace_integer_product(node, weights)
        return True
    formula = DYNAMIC.get(kind) or static.FORMULAS.get(kind)
    if formula is None and kind in static.DIRECT and not node.domain:
        formula = static.write_direct
    if formula is None:
        return False
    builder = NodeBuilder(f"{node.outputs[0].name or node.name}/float")
    made = formula(builder, node, weights)
    if made is None:
        return False
    builder.replace(node, made)
    return True


def _drop_left_over(graph: ir.Graph) -> None:
    """Remove the nodes and constants that only integer arithmetic needed, in place."""
    kept = set(graph.outputs)
    for node in [node for node in reversed(graph) if node.op_type in _LEFT_OVER]:
        if not any(value.uses() or value in kept for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in kept:
            graph.initializers.pop(name)
