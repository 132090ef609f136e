"""Mutations of a model: some of its bytes, most of its structure, so that many pass the gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper

_INTEGERS = (
    0, 1, -1, 2, 3, 4, 5, 7, 16, -2, -3, 127, 255, 2**16, 2**31 - 1, 2**31, -(2**31), 2**32,
    2**60, 2**63 - 1, -(2**63),
)  # fmt: skip
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e38, math.inf, -math.inf, math.nan)
_STRINGS = ("", "x", "y", "\n", "../x", "a b", "é", "N", "*", "SAME_UPPER", "linear", "constant")
_OPERATORS = [
    schema
    for schema in sorted(onnx.defs.get_all_schemas(), key=lambda schema: schema.name)
    if schema.domain == "" and not schema.deprecated
]

Mutation = Callable[[Random, ModelProto], None]


def mutate(random: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate a model one to four times; ``others`` is what may be spliced into it."""
    for _ in range(random.choice((1, 1, 2, 2, 3, 4))):
        if random.random() < 0.04:
            content = _flip_bytes(random, content)
            continue
        model = ModelProto()
        try:
            model.ParseFromString(content)
        except DecodeError:
            return content
        with suppress(AttributeError, TypeError, ValueError):  # text of the last one is no UTF-8
            if random.random() < 0.05:
                _splice(random, model, random.choice(others))
            else:
                random.choice(_MUTATIONS)(random, model)
        content = model.SerializeToString()
    return content


def _flip_bytes(random: Random, content: bytes) -> bytes:
    flipped = bytearray(content)
    for _ in range(random.choice((1, 1, 3))):
        place = random.randrange(len(flipped) or 1)
        if random.random() < 0.2:
            del flipped[place : place + random.randrange(1, 9)]
        elif place < len(flipped):
            flipped[place] = random.randrange(256)
    return bytes(flipped)


def _pick_graph(random: Random, model: ModelProto) -> GraphProto:
    graphs = [model.graph]
    for node in model.graph.node:
        graphs += [a.g for a in node.attribute if a.HasField("g")]
    return random.choice(graphs)


def _pick_node(random: Random, model: ModelProto) -> NodeProto:
    graph = _pick_graph(random, model)
    node: NodeProto = random.choice(graph.node) if graph.node else graph.node.add()
    return node


def _list_names(graph: GraphProto) -> list[str]:
    names = [value.name for value in (*graph.input, *graph.initializer)]
    return [*names, *(name for node in graph.node for name in node.output)] or [""]


def _change_field(random: Random, model: ModelProto) -> None:
    """Change any field of any message, found by reflection."""
    messages: list[Message] = []
    pending: list[Message] = [model]
    while pending:
        message = pending.pop()
        messages.append(message)
        for field, value in message.ListFields():
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                pending.extend(value if _is_repeated(field) else [value])
    message = random.choice(messages[2:] or messages)  # model and graph stand first
    _change_message(random, message, _list_names(model.graph))


def _is_repeated(field: FieldDescriptor) -> bool:
    return bool(field.is_repeated)


def _change_message(random: Random, message: Message, names: Sequence[str]) -> None:
    present = [field for field, _ in message.ListFields()]
    declared: Sequence[FieldDescriptor] = message.DESCRIPTOR.fields
    field = random.choice(present if present and random.random() < 0.8 else declared)
    if _is_repeated(field):
        _change_repeated(random, getattr(message, field.name), field, names)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _draw_scalar(random, field, names))


def _change_repeated(
    random: Random, items: Any, field: FieldDescriptor, names: Sequence[str]
) -> None:
    choice = random.randrange(4)
    if items and choice == 0:
        del items[random.randrange(len(items))]
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        if items:
            chosen, other = random.choice(items), random.choice(items)
            if choice == 1:
                items.append(chosen)
            elif choice == 2:
                kept = type(chosen)()
                kept.CopyFrom(chosen)
                chosen.CopyFrom(other)
                other.CopyFrom(kept)
            else:
                _change_message(random, chosen, names)
    elif items and choice == 1:
        items[random.randrange(len(items))] = _draw_scalar(random, field, names)
    else:
        items.append(_draw_scalar(random, field, names))


def _draw_scalar(random: Random, field: FieldDescriptor, names: Sequence[str]) -> Any:
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return random.choice(_FLOATS)
    if field.type == FieldDescriptor.TYPE_STRING:
        return random.choice(names) if random.random() < 0.7 else random.choice(_STRINGS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return random.randbytes(random.choice((0, 1, 4, 8, 16, 48)))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return random.choice(field.enum_type.values).number
    value = random.choice(_INTEGERS)
    if field.type == FieldDescriptor.TYPE_INT32:
        return max(-(2**31), min(value, 2**31 - 1))
    if field.type == FieldDescriptor.TYPE_UINT64:
        return abs(value)
    return value


def _delete_node(random: Random, model: ModelProto) -> None:
    nodes = model.graph.node
    if nodes:
        del nodes[random.randrange(len(nodes))]


def _bypass_node(random: Random, model: ModelProto) -> None:
    """Take a node out and lead its users to its input."""
    nodes = model.graph.node
    if nodes:
        node = nodes.pop(random.randrange(len(nodes)))
        if node.input and node.output:
            _rename_uses(model.graph, node.output[0], node.input[0])


def _rename_uses(graph: GraphProto, old: str, new: str, start: int = 0) -> None:
    for node in graph.node[start:]:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def _swap_nodes(random: Random, model: ModelProto) -> None:
    nodes = model.graph.node
    if len(nodes) > 1:
        first, second = random.choice(nodes), random.choice(nodes)
        kept = NodeProto()
        kept.CopyFrom(first)
        first.CopyFrom(second)
        second.CopyFrom(kept)


def _rewire(random: Random, model: ModelProto) -> None:
    """Let a node read another value, as a rule one that stands before it."""
    graph = model.graph
    if not graph.node:
        return
    place = random.randrange(len(graph.node))
    node = graph.node[place]
    earlier = [v.name for v in (*graph.input, *graph.initializer)]
    earlier += [name for n in graph.node[:place] for name in n.output]
    if random.random() < 0.2:
        node.input.append(random.choice(earlier or [""]))
    elif node.input:
        name = random.choice(earlier) if earlier and random.random() < 0.85 else ""
        node.input[random.randrange(len(node.input))] = name


def _pick_operator(random: Random, model: ModelProto) -> onnx.defs.OpSchema:
    """Pick an operator, as a rule one that the model's opset has."""
    schema = random.choice(_OPERATORS)
    for _ in range(4):
        if not model.opset_import or schema.since_version <= model.opset_import[0].version:
            break
        with suppress(onnx.defs.SchemaError):
            return onnx.defs.get_schema(schema.name, model.opset_import[0].version)
        schema = random.choice(_OPERATORS)
    return schema


def _change_operator(random: Random, model: ModelProto) -> None:
    node = _pick_node(random, model)
    node.op_type = _pick_operator(random, model).name
    if random.random() < 0.7:
        del node.attribute[:]
    _add_attributes(random, model, node)


def _insert_node(random: Random, model: ModelProto) -> None:
    """Put a node of any operator behind a value, and lead the value's users to it."""
    graph = model.graph
    place = random.randrange(len(graph.node) + 1)
    before = [v.name for v in (*graph.input, *graph.initializer)]
    before += [name for n in graph.node[:place] for name in n.output if name]
    if not before:
        return
    source = before[-1] if random.random() < 0.5 else random.choice(before)
    schema = _pick_operator(random, model)
    count = random.randint(schema.min_input, max(schema.min_input, min(schema.max_input, 4)))
    inputs = [source, *(random.choice(before) for _ in range(count - 1))]
    outputs = [f"inserted{random.randrange(10**6)}_{i}" for i in range(schema.min_output or 1)]
    node = helper.make_node(schema.name, inputs[:count], outputs, name=f"{outputs[0]}_node")
    _add_attributes(random, model, node)
    _rename_uses(graph, source, outputs[0], place)
    graph.node.insert(place, node)


def _add_attributes(random: Random, model: ModelProto, node: NodeProto) -> None:
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
        attribute.i = random.choice(_INTEGERS)
    elif attribute.type == kinds.FLOAT:
        attribute.f = random.choice(_FLOATS)
    elif attribute.type == kinds.STRING:
        attribute.s = random.choice(_STRINGS).encode()
    elif attribute.type == kinds.INTS:
        attribute.ints.extend(random.choice(_INTEGERS) for _ in range(random.randrange(5)))
    elif attribute.type == kinds.FLOATS:
        attribute.floats.extend(random.choice(_FLOATS) for _ in range(random.randrange(4)))
    elif attribute.type == kinds.STRINGS:
        attribute.strings.extend(random.choice(_STRINGS).encode() for _ in range(2))
    elif attribute.type == kinds.TENSOR:
        attribute.t.CopyFrom(_draw_tensor(random, "value"))
    elif attribute.type == kinds.GRAPH:
        body = GraphProto()  # a message copied into itself ends the process
        body.CopyFrom(model.graph)
        _draw_body(random, body)
        attribute.g.CopyFrom(body)


def _draw_body(random: Random, body: GraphProto) -> None:
    """Make a small body of a graph: it captures, it may take inputs, it gives one output."""
    names = _list_names(body)
    del body.node[:], body.initializer[:], body.output[:], body.value_info[:]
    del body.input[random.randrange(3) :]
    for value in body.input:
        value.name = f"body.{value.name}"
    source = random.choice([*names, *(value.name for value in body.input)])
    body.node.append(helper.make_node(random.choice(("Identity", "Relu", "Neg")), [source], ["z"]))
    for _ in range(random.randrange(3)):
        body.output.add(name="z").type.tensor_type.elem_type = 1


def _draw_tensor(random: Random, name: str) -> onnx.TensorProto:
    shape = [random.choice((0, 1, 1, 2, 3, 4)) for _ in range(random.randrange(4))]
    if random.random() < 0.5:
        integers = np.array([random.choice(_INTEGERS) for _ in range(math.prod(shape))], np.int64)
        return numpy_helper.from_array(integers.reshape(shape), name)
    floats = np.array([random.choice(_FLOATS) for _ in range(math.prod(shape))], np.float32)
    return numpy_helper.from_array(floats.reshape(shape), name)


def _change_attribute(random: Random, model: ModelProto) -> None:
    node = _pick_node(random, model)
    if node.attribute and random.random() < 0.8:
        _change_message(random, random.choice(node.attribute), _list_names(model.graph))
    else:
        _add_attributes(random, model, node)


def _change_weight(random: Random, model: ModelProto) -> None:
    """Give an initializer, or what a Constant holds, other contents, dtype or shape."""
    tensors = list(model.graph.initializer)
    tensors += [a.t for n in model.graph.node for a in n.attribute if a.HasField("t")]
    if not tensors:
        return
    tensor = random.choice(tensors)
    choice = random.randrange(4)
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, onnx.checker.ValidationError):
        return
    if choice == 0:
        changed = _draw_tensor(random, tensor.name)
    elif choice == 1:
        kinds: Sequence[Any] = (np.float64, np.float16, np.int32, np.int64, np.uint8, np.bool_)
        with np.errstate(all="ignore"):
            changed = numpy_helper.from_array(array.astype(random.choice(kinds)), tensor.name)
    elif choice == 2:
        flat = array.reshape(-1).copy()
        if flat.size and flat.dtype.kind in "if":
            value = random.choice(_FLOATS if flat.dtype.kind == "f" else _INTEGERS)
            with np.errstate(all="ignore"):
                flat[random.randrange(flat.size)] = np.array(value).astype(flat.dtype)
        changed = numpy_helper.from_array(flat.reshape(array.shape), tensor.name)
    else:
        shape = list(array.shape)
        random.shuffle(shape)
        changed = numpy_helper.from_array(array.reshape(shape), tensor.name)
    tensor.CopyFrom(changed)


def _change_port(random: Random, model: ModelProto) -> None:
    """Change the declared type or shape of an input, output or inner value."""
    ports = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    if not ports:
        return
    kind = random.choice(ports).type.tensor_type
    choice = random.randrange(5)
    if choice == 0:
        kind.elem_type = random.choice((1, 1, 10, 11, 6, 7, 9, 16, 3, 8, 14, 0, 22))
    elif choice == 1 and kind.shape.dim:
        dim = random.choice(kind.shape.dim)
        dim.dim_value = random.choice(_INTEGERS)
    elif choice == 2 and kind.shape.dim:
        dim = random.choice(kind.shape.dim)
        dim.Clear()
        dim.dim_param = random.choice(("", "N", "M", "unk__0"))
    elif choice == 3 and kind.shape.dim:
        del kind.shape.dim[-1]
    else:
        kind.shape.dim.add(dim_value=random.choice((0, 1, 2)))


def _expose(random: Random, model: ModelProto) -> None:
    """Make any value a further output, or the first."""
    value = onnx.ValueInfoProto(name=random.choice(_list_names(model.graph)))
    if random.random() < 0.5:
        value.type.tensor_type.elem_type = 1
    model.graph.output.insert(random.choice((0, len(model.graph.output))), value)


def _nest(random: Random, model: ModelProto) -> None:
    """Put a node into the branches of an If, or into a function."""
    graph = model.graph
    if not graph.node:
        return
    place = random.randrange(len(graph.node))
    node = NodeProto()
    node.CopyFrom(graph.node[place])
    if random.random() < 0.5:
        condition = f"condition{random.randrange(10**6)}"
        graph.initializer.append(numpy_helper.from_array(np.array(True), condition))
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
        body = helper.make_graph([node], "body", [], outputs)
        for value in body.output:
            value.type.tensor_type.elem_type = 1
        made = helper.make_node("If", [condition], list(node.output))
        for name in ("then_branch", "else_branch"):
            made.attribute.append(helper.make_attribute(name, body))
    else:
        name = f"F{random.randrange(3)}"
        model.functions.append(
            helper.make_function(
                "mine", name, list(dict.fromkeys(node.input)), list(node.output), [node],
                list(model.opset_import),
            )
        )  # fmt: skip
        if not any(entry.domain == "mine" for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid("mine", 1))
        made = helper.make_node(
            name, list(dict.fromkeys(node.input)), list(node.output), domain="mine"
        )
    graph.node[place].CopyFrom(made)


def _change_opset(random: Random, model: ModelProto) -> None:
    if model.opset_import:
        model.opset_import[0].version = random.randint(1, onnx.defs.onnx_opset_version())


def _splice(random: Random, model: ModelProto, other: bytes) -> None:
    """Append another model's graph, fed with a value of this one."""
    donor = ModelProto.FromString(other)
    source = random.choice(_list_names(model.graph))
    inputs = {value.name for value in donor.graph.input}
    for node in donor.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = source if name in inputs else name and f"donor.{name}"
    for tensor in donor.graph.initializer:
        tensor.name = f"donor.{tensor.name}"
    model.graph.node.extend(donor.graph.node)
    model.graph.initializer.extend(donor.graph.initializer)
    for value in donor.graph.output:
        value.name = f"donor.{value.name}"
        model.graph.output.insert(0, value)


_MUTATIONS: Sequence[Mutation] = (
    _change_field,
    _change_field,
    _delete_node,
    _bypass_node,
    _swap_nodes,
    _rewire,
    _rewire,
    _change_operator,
    _change_operator,
    _insert_node,
    _insert_node,
    _change_attribute,
    _change_attribute,
    _change_weight,
    _change_weight,
    _change_port,
    _expose,
    _nest,
    _change_opset,
)
