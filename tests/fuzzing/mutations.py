"""Mutations of a model: some of its bytes, most of its structure, so that many pass the gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, numpy_helper

from tests.fuzzing.attributes import add_attributes
from tests.fuzzing.node_mutations import (
    bypass_node,
    change_operator,
    delete_node,
    insert_node,
    nest,
    rewire,
    swap_nodes,
)
from tests.fuzzing.random_parts import (
    FLOATS,
    INTEGERS,
    draw_scalar,
    draw_tensor,
    list_names,
    pick_node,
)

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
        with suppress(AttributeError, TypeError, ValueError):  # text of the last one is not UTF-8
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
    _change_message(random, message, list_names(model.graph))


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
        setattr(message, field.name, draw_scalar(random, field, names))


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
        items[random.randrange(len(items))] = draw_scalar(random, field, names)
    else:
        items.append(draw_scalar(random, field, names))


def _change_attribute(random: Random, model: ModelProto) -> None:
    node = pick_node(random, model)
    if node.attribute and random.random() < 0.8:
        _change_message(random, random.choice(node.attribute), list_names(model.graph))
    else:
        add_attributes(random, model, node)


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
        changed = draw_tensor(random, tensor.name)
    elif choice == 1:
        kinds: Sequence[Any] = (np.float64, np.float16, np.int32, np.int64, np.uint8, np.bool_)
        with np.errstate(all="ignore"):
            changed = numpy_helper.from_array(array.astype(random.choice(kinds)), tensor.name)
    elif choice == 2:
        flat = array.reshape(-1).copy()
        if flat.size and flat.dtype.kind in "if":
            value = random.choice(FLOATS if flat.dtype.kind == "f" else INTEGERS)
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
        dim.dim_value = random.choice(INTEGERS)
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
    value = onnx.ValueInfoProto(name=random.choice(list_names(model.graph)))
    if random.random() < 0.5:
        value.type.tensor_type.elem_type = 1
    model.graph.output.insert(random.choice((0, len(model.graph.output))), value)


def _change_opset(random: Random, model: ModelProto) -> None:
    if model.opset_import:
        model.opset_import[0].version = random.randint(1, onnx.defs.onnx_opset_version())


def _splice(random: Random, model: ModelProto, other: bytes) -> None:
    """Append another model's graph, fed with a value of this one."""
    donor = ModelProto.FromString(other)
    source = random.choice(list_names(model.graph))
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
    delete_node,
    bypass_node,
    swap_nodes,
    rewire,
    rewire,
    change_operator,
    change_operator,
    insert_node,
    insert_node,
    _change_attribute,
    _change_attribute,
    _change_weight,
    _change_weight,
    _change_port,
    _expose,
    nest,
    _change_opset,
)
