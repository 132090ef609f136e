"""Operators and attributes that a mutation gives to a node."""

from __future__ import annotations

from contextlib import suppress
from random import Random
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper

from tests.fuzzing.random_parts import (
    FLOATS,
    INTEGERS,
    STRINGS,
    draw_tensor,
    list_names,
)

_OPERATORS = [
    schema
    for schema in sorted(onnx.defs.get_all_schemas(), key=lambda schema: schema.name)
    if schema.domain == "" and not schema.deprecated
]


def pick_operator(random: Random, model: ModelProto) -> onnx.defs.OpSchema:
    """Pick an operator, as a rule one that the model's opset has."""
    schema = random.choice(_OPERATORS)
    for _ in range(4):
        if not model.opset_import or schema.since_version <= model.opset_import[0].version:
            break
        with suppress(onnx.defs.SchemaError):
            return onnx.defs.get_schema(schema.name, model.opset_import[0].version)
        schema = random.choice(_OPERATORS)
    return schema


def add_attributes(random: Random, model: ModelProto, node: NodeProto) -> None:
    """Give a node attributes that its operator has, with values of the right kind, mostly."""
    try:
        schema = onnx.defs.get_schema(node.op_type)
    except onnx.defs.SchemaError:
        return
    present = {attribute.name for attribute in node.attribute}
    for name, declared in schema.attributes.items():
        if name not in present and (declared.required or random.random() < 0.3):
            kind: Any = declared.type
            attribute = node.attribute.add(name=name, type=kind.value)
            _fill_attribute(random, model, attribute)


def _fill_attribute(random: Random, model: ModelProto, attribute: AttributeProto) -> None:
    kinds = AttributeProto
    if attribute.type == kinds.INT:
        attribute.i = random.choice(INTEGERS)
    elif attribute.type == kinds.FLOAT:
        attribute.f = random.choice(FLOATS)
    elif attribute.type == kinds.STRING:
        attribute.s = random.choice(STRINGS).encode()
    elif attribute.type == kinds.INTS:
        attribute.ints.extend(random.choice(INTEGERS) for _ in range(random.randrange(5)))
    elif attribute.type == kinds.FLOATS:
        attribute.floats.extend(random.choice(FLOATS) for _ in range(random.randrange(4)))
    elif attribute.type == kinds.STRINGS:
        attribute.strings.extend(random.choice(STRINGS).encode() for _ in range(2))
    elif attribute.type == kinds.TENSOR:
        attribute.t.CopyFrom(draw_tensor(random, "value"))
    elif attribute.type == kinds.GRAPH:
        body = GraphProto()  # a message copied into itself ends the process
        body.CopyFrom(model.graph)
        _draw_body(random, body)
        attribute.g.CopyFrom(body)


def _draw_body(random: Random, body: GraphProto) -> None:
    """Make a small body of a graph: it captures, it may take inputs, it gives one output."""
    names = list_names(body)
    del body.node[:], body.initializer[:], body.output[:], body.value_info[:]
    del body.input[random.randrange(3) :]
    for value in body.input:
        value.name = f"body.{value.name}"
    source = random.choice([*names, *(value.name for value in body.input)])
    body.node.append(helper.make_node(random.choice(("Identity", "Relu", "Neg")), [source], ["z"]))
    for _ in range(random.randrange(3)):
        body.output.add(name="z").type.tensor_type.elem_type = 1
