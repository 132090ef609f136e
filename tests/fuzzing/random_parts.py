"""What mutations draw: graphs, nodes, names, numbers and tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper

INTEGERS = (
    0, 1, -1, 2, 3, 4, 5, 7, 16, -2, -3, 127, 255, 2**16, 2**31 - 1, 2**31, -(2**31), 2**32,
    2**60, 2**63 - 1, -(2**63),
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e38, math.inf, -math.inf, math.nan)
STRINGS = ("", "x", "y", "\n", "../x", "a b", "é", "N", "*", "SAME_UPPER", "linear", "constant")


def pick_graph(random: Random, model: ModelProto) -> GraphProto:
    graphs = [model.graph]
    for node in model.graph.node:
        graphs += [a.g for a in node.attribute if a.HasField("g")]
    return random.choice(graphs)


def pick_node(random: Random, model: ModelProto) -> NodeProto:
    graph = pick_graph(random, model)
    node: NodeProto = random.choice(graph.node) if graph.node else graph.node.add()
    return node


def list_names(graph: GraphProto) -> list[str]:
    names = [value.name for value in (*graph.input, *graph.initializer)]
    return [*names, *(name for node in graph.node for name in node.output)] or [""]


def draw_scalar(random: Random, field: FieldDescriptor, names: Sequence[str]) -> Any:
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return random.choice(FLOATS)
    if field.type == FieldDescriptor.TYPE_STRING:
        return random.choice(names) if random.random() < 0.7 else random.choice(STRINGS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return random.randbytes(random.choice((0, 1, 4, 8, 16, 48)))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return random.choice(field.enum_type.values).number
    value = random.choice(INTEGERS)
    if field.type == FieldDescriptor.TYPE_INT32:
        return max(-(2**31), min(value, 2**31 - 1))
    if field.type == FieldDescriptor.TYPE_UINT64:
        return abs(value)
    return value


def draw_tensor(random: Random, name: str) -> onnx.TensorProto:
    shape = [random.choice((0, 1, 1, 2, 3, 4)) for _ in range(random.randrange(4))]
    if random.random() < 0.5:
        integers = np.array([random.choice(INTEGERS) for _ in range(math.prod(shape))], np.int64)
        return numpy_helper.from_array(integers.reshape(shape), name)
    floats = np.array([random.choice(FLOATS) for _ in range(math.prod(shape))], np.float32)
    return numpy_helper.from_array(floats.reshape(shape), name)
