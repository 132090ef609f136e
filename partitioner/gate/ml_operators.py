"""Rewrite operators of the domain ``ai.onnx.ml`` that exporters add around a network.

skl2onnx scales the inputs of a perceptron (Scaler), selects the predicted label
(ArrayFeatureExtractor) and wraps the probabilities in dictionaries (ZipMap).  Only these three
operators are supported.  The other operators of the domain, mainly trees, have no gradient and are
refused at the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_rank

DOMAIN = "ai.onnx.ml"

_Rewrite = Callable[[NodeBuilder, ir.Node], ir.Value]


def unwrap_maps(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without ZipMap: its output becomes the tensor of probabilities itself.

    onnx-ir has no type for dictionaries.  If the model has no ZipMap, ``proto`` itself is returned,
    else a changed copy.
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
    """Rewrite the nodes of the domain in standard operators, in place."""
    for node in list(graph):
        if node.domain == DOMAIN:
            builder = NodeBuilder(f"{node.outputs[0].name or node.name}/normalized")
            builder.replace(node, [ESTIMATORS[node.op_type](builder, node)])


def _rewrite_extractor(builder: NodeBuilder, node: ir.Node) -> ir.Value:
    """Select columns of the last axis; a vector counts as one row."""
    source, picks = node.inputs
    assert source is not None
    assert picks is not None
    if known_rank(source) == 1:
        source = builder.op("Unsqueeze", source, builder.integers([0]))
    flat = builder.op("Reshape", picks, builder.integers([-1]))
    return builder.op("Gather", source, flat, axis=-1)


def _rewrite_scaler(builder: NodeBuilder, node: ir.Node) -> ir.Value:
    """(x - offset) * scale, as F32."""
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
"""Map each supported operator of the domain to its rewrite; the gate refuses all others."""
