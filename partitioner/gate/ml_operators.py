"""Rewrite the operators of the domain ``ai.onnx.ml`` that exporters add around a network.

For a perceptron, skl2onnx writes a Scaler for the inputs, an ArrayFeatureExtractor that selects the
predicted label, and a ZipMap that puts the probabilities into dictionaries.  Only these three
operators are supported.  The gate refuses the other operators of the domain, mainly trees, which
have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_rank

DOMAIN = "ai.onnx.ml"

_Rewrite = Callable[[NodeBuilder, ir.Node], ir.Value]


def unwrap_maps(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without ZipMap: outputs become tensors of probabilities, not dictionaries.

    onnx-ir has no type for dictionaries.  The result is a changed copy, or ``proto`` itself if the
    model has no ZipMap.
    """
    if not any(node.domain == DOMAIN and node.op_type == "ZipMap" for node in proto.graph.node):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    unwrapped = set()
    for node in copy.graph.node:
        if node.domain == DOMAIN and node.op_type == "ZipMap":
            node.op_type, node.domain = "Identity", ""
            del node.attribute[:]
            unwrapped.update(node.output)
    for value in (*copy.graph.output, *copy.graph.value_info):
        if value.name in unwrapped:
            value.type.Clear()
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            value.type.tensor_type.shape.dim.add()  # samples
            value.type.tensor_type.shape.dim.add()  # classes
    return copy


def normalize_ml_operators(graph: ir.Graph) -> None:
    """Replace operators of the domain ``ai.onnx.ml`` with standard operators, in place."""
    for node in list(graph):
        if node.domain == DOMAIN:
            builder = NodeBuilder(f"{node.outputs[0].name or node.name}/normalized")
            builder.replace(node, [ESTIMATORS[node.op_type](builder, node)])


def _rewrite_extractor(builder: NodeBuilder, node: ir.Node) -> ir.Value:
    """Select elements along the last axis; a vector is treated as a single row."""
    source, picks = node.inputs
    assert source is not None
    assert picks is not None
    if known_rank(source) == 1:
        source = builder.op("Unsqueeze", source, builder.integers([0]))
    flat = builder.op("Reshape", picks, builder.integers([-1]))
    return builder.op("Gather", source, flat, axis=-1)


def _rewrite_scaler(builder: NodeBuilder, node: ir.Node) -> ir.Value:
    """Compute ``(x - offset) * scale`` in F32."""
    value = node.inputs[0]
    assert value is not None
    value = builder.cast(value, ir.DataType.FLOAT)
    for kind, name in (("Sub", "offset"), ("Mul", "scale")):
        if name in node.attributes:
            numbers = node.attributes[name].as_floats()
            constant = builder.tensor(ir.tensor(list(numbers), dtype=ir.DataType.FLOAT))
            value = builder.op(kind, value, constant)
    return value


ESTIMATORS: Mapping[str, _Rewrite] = {
    "ArrayFeatureExtractor": _rewrite_extractor,
    "Scaler": _rewrite_scaler,
}
"""Map each supported operator of the domain to the function that rewrites it."""
