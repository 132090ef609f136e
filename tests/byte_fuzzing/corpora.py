"""Inputs to start from, and words that are worth putting in; all made from the code itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, get_args

import msgspec
import numpy as np
from msgspec import inspect
from onnx import ModelProto, TensorProto, helper, numpy_helper

from splitonnx.codecs import encode_tensors
from splitonnx.manifests import (
    FORMAT,
    BundleManifest,
    PartyManifest,
    Role,
    Source,
    WireKind,
    encode_manifest,
)
from splitonnx.messages import Message
from splitonnx.operators import STANDARD_OPERATORS, TRAINING_OPERATORS
from splitonnx.recipes import Recipe
from splitonnx.runtime.wire.protocols import State
from splitonnx.tensors import DTYPES
from tests.byte_fuzzing.framings import END, NESTED
from tests.byte_fuzzing.targets import FORGED, read_manifest
from tests.fuzzing.corpora import list_models

_LONGEST_MODEL = 500
"""Bytes; short inputs are tried by the ten thousand a second."""


def list_inputs(target: str) -> list[bytes]:
    """List the inputs that a target starts from."""
    makers = {
        "codec": _list_tensors,
        "message": _list_messages,
        "protocol": _list_exchanges,
        "manifest": _list_manifests,
        "graph": _list_graphs,
        "model": _list_user_models,
    }
    return list(makers[target]())


def list_words(target: str) -> list[bytes]:
    """List the words that a target knows."""
    if target in ("graph", "model"):
        words = [*STANDARD_OPERATORS, *TRAINING_OPERATORS, "com.microsoft", "ai.onnx", "value"]
        words += ["location", "axis", "axes", "kernel_shape", "to", "then_branch", "body"]
        numbers = [b"\xff" * 9 + b"\x01", b"\x80" * 9, b"\x80" * 9 + b"\x01"]
        return [*(word.encode() for word in sorted(words)), *numbers, *_list_fields()]
    words = [*DTYPES, *State, *Source, *Role, *WireKind, "dtype", "shape", "data_offsets"]
    words += ["__metadata__", "splitonnx", "NaN", "Infinity", "\\ud800", "null", "true", "1e999"]
    words += [str(2**63), str(2**64), "9" * 30, "-1", "0.0", "[[[[", "{}", FORMAT]
    for kind in (*get_args(Message), PartyManifest, BundleManifest):
        words += [kind.__name__, *_list_names(kind)]
    return [b"\0", b"\n\n", *(f'"{word}"'.encode() for word in words), *map(str.encode, words)]


def write_program(content: bytes, kind: Any) -> bytes:
    """Write a protobuf message as a program for :func:`framings.frame_protobuf`.

    ``kind`` is the message's descriptor; fields of more bytes than fit a program are cut off.
    """
    program, at = bytearray(), 0
    while at < len(content):
        tag, at = _read_number(content, at)
        field = kind.fields_by_number[tag >> 3]
        program.append(tag)
        if tag & 7 != 2:
            end = {1: at + 8, 5: at + 4}.get(tag & 7) or _read_number(content, at)[1]
            program += content[at:end]
        else:
            length, at = _read_number(content, at)
            end = at + length
            if field.message_type is None:
                text = content[at : min(end, at + NESTED - 1)]
                program += bytes([len(text)]) + text
            else:
                inner = write_program(content[at:end], field.message_type)
                program += bytes([NESTED]) + inner + bytes([END])
        at = end
    return bytes(program)


def _read_number(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while content[at] > 127:
        value |= (content[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | content[at] << shift, at + 1


def _list_fields() -> Iterator[bytes]:
    """Yield each field that a message may have, or must not, as a piece of a program."""
    for descriptor in ModelProto.DESCRIPTOR.file.message_types_by_name.values():
        for field in [f for kind in (descriptor, *descriptor.nested_types) for f in kind.fields]:
            start = field.number << 3
            if field.message_type is not None:
                yield bytes([start | 2, NESTED, END])
            elif field.type in (field.TYPE_STRING, field.TYPE_BYTES):
                yield bytes([start | 2, 1, 65])
            elif field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
                width, wire = (4, 5) if field.type == field.TYPE_FLOAT else (8, 1)
                yield bytes([start | wire, *bytes(width)])
                yield bytes([start | 2, width, *bytes(width)])
            else:
                yield from (bytes([start, 1]), bytes([start, 0]), bytes([start | 2, 2, 1, 1]))


def _list_choices() -> Iterator[bytes]:
    """Yield inputs that choose, honest ones and others."""
    yield FORGED + bytes(80)
    random = Random(0)
    for most in (224, 230, 256):
        yield from (FORGED + bytes(random.choices(range(most), k=80)) for _ in range(20))


def _list_tensors() -> Iterator[bytes]:
    yield from _list_choices()
    random = np.random.default_rng(0)
    yield b"h{}\0"
    for shape in ((), (2, 3), (0, 4)):
        for dtype in DTYPES.values():
            array = random.integers(0, 2, shape).astype(dtype)
            yield _unframe(encode_tensors({"a": array}))
    arrays = {name: np.zeros(size, dtype) for name, size, dtype in (("a", 2, "f4"), ("b", 3, "?"))}
    yield _unframe(encode_tensors(arrays, {"k": "v"}))
    yield b"r" + b"".join(encode_tensors(arrays, {"k": "v"}))


def _unframe(chunks: Sequence[bytes | memoryview]) -> bytes:
    content = b"".join(chunks)
    end = 8 + int.from_bytes(content[:8], "little")
    return b"h" + content[8:end].rstrip() + b"\0" + content[end:]


def _list_messages() -> Iterator[bytes]:
    yield from _list_choices()
    for kind in get_args(Message):
        yield b"m" + json.dumps(_draw(kind)).encode() + b"\0\0"
    yield b"m" + _write_wires("server", "train")


def _list_exchanges() -> Iterator[bytes]:
    states = list(State)
    messages = [message for message in _list_messages() if message[:1] != FORGED]
    for place in range(len(states)):
        for role in (0, 1):
            yield from (bytes([place << 1 | role]) + message for message in messages)
    opened = states.index(State.OPEN) << 1
    for flags in (opened, opened | 1):
        yield from (bytes([flags]) + choices for choices in _list_choices())
    for phase in ("train", "predict"):
        for role, peer in ((0, "server"), (1, "client")):
            task = b"m" + _write_wires(peer, phase)
            yield bytes([opened | role]) + task + b"\n\n" + task


def _write_wires(sender: str, phase: str) -> bytes:
    """Write a message with every wire that ``sender`` sends in a phase, of two samples."""
    from splitonnx.messages import Tensors

    fields = {**_draw(Tensors), "phase": phase}
    entries, data = [], b""
    for wire in read_manifest(sender).phase(phase).wires:
        if wire.sender == sender:
            shape = [dim if isinstance(dim, int) else 2 for dim in wire.tensor.shape]
            array = np.zeros(shape, DTYPES[wire.tensor.dtype])
            place = [len(data), len(data) + array.nbytes]
            entry = {"dtype": wire.tensor.dtype, "shape": shape, "data_offsets": place}
            entries.append(f'"{wire.tensor.name}":{json.dumps(entry)}')
            data += array.tobytes()
    return json.dumps(fields).encode() + b"\0" + ",".join(entries).encode() + b"\0" + data


def _list_manifests() -> Iterator[bytes]:
    party = read_manifest("client")
    yield b"p" + msgspec.json.encode(msgspec.structs.replace(party, phases=(), state=()))
    for phase in party.phases[:1]:
        small = msgspec.structs.replace(phase, stages=phase.stages[:1], wires=phase.wires[:1])
        yield b"p" + msgspec.json.encode(msgspec.structs.replace(party, phases=(small,), state=()))
    recipe = Recipe(at=("a",), tail_at=(), loss="mse", output="y", optimizer={"lr": 0.1})
    whole = BundleManifest(format=FORMAT, digest="d", recipe=recipe, parties=("client",))
    yield b"b" + encode_manifest(whole)


def _draw(kind: type) -> Any:
    """Make up the JSON of a message's kind."""
    return _draw_type(inspect.type_info(kind))


def _draw_type(info: Any) -> Any:
    match info:
        case inspect.StructType():
            tag = {} if info.tag is None else {info.tag_field: info.tag}
            return tag | {field.encode_name: _draw_type(field.type) for field in info.fields}
        case inspect.UnionType():
            return _draw_type(info.types[0])
        case inspect.DictType():
            return {}
        case inspect.ListType() | inspect.VarTupleType():
            return []
        case inspect.StrType():
            return "0" * 32
        case inspect.FloatType():
            return 0.5
        case inspect.BoolType():
            return True
        case inspect.IntType():
            return 1
    return None


def _list_names(kind: type) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def _list_user_models() -> Iterator[bytes]:
    for content in _list_small_models():
        yield b"p" + write_program(content, ModelProto.DESCRIPTOR)
        yield b"r" + content


def _list_graphs() -> Iterator[bytes]:
    for content in _list_small_models():
        model = ModelProto.FromString(content)
        model.ir_version = 10
        for entry in model.opset_import:
            entry.version = min(entry.version, 21 if entry.domain in ("", "ai.onnx") else 1)
        yield b"p" + write_program(model.SerializeToString(), ModelProto.DESCRIPTOR)
        yield b"r" + model.SerializeToString()


def _list_small_models() -> Iterator[bytes]:
    *_, cases = list_models()
    yield from [content for content in cases if len(content) < _LONGEST_MODEL][::12]
    yield from _list_odd_models()


def _list_odd_models() -> Iterator[bytes]:
    """Give what node cases lack: bodies, functions, every element type, data outside."""
    held = helper.make_node("Identity", ["x"], ["i"])
    body = helper.make_graph([held], "body", [], [helper.make_tensor_value_info("i", 1, None)])
    yield _finish(helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body))
    for kind in (1, 2, 6, 7, 9, 10, 11, 13, 16):
        tensor = helper.make_tensor("t", kind, [2], [0, 1])
        yield _finish(helper.make_node("Constant", [], ["y"], value=tensor))
    for location in (TensorProto.DEFAULT, TensorProto.EXTERNAL):
        outside = TensorProto(name="t", data_type=1, dims=[1], raw_data=bytes(4))
        outside.data_location = location
        yield _finish(helper.make_node("Constant", [], ["y"], value=outside))
        outside.external_data.add(key="location", value="weights")
        yield _finish(helper.make_node("Constant", [], ["y"], value=outside))
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("v", 1, [1], [1.0]), helper.make_tensor("i", 7, [1], [0]), [3]
    )
    yield _finish(helper.make_node("Constant", [], ["y"], sparse_value=sparse))
    yield _finish(helper.make_node("ReluGrad", ["x", "x"], ["y"], domain="com.microsoft"))
    model = ModelProto.FromString(_finish(helper.make_node("F", ["x"], ["y"], domain="own")))
    function = helper.make_function("own", "F", ["x"], ["i"], [held], model.opset_import)
    model.functions.append(function)
    yield model.SerializeToString()


def _finish(node: Any) -> bytes:
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 2])],
        [helper.make_tensor_sequence_value_info("y", 1, None)],
        [numpy_helper.from_array(np.ones(2, np.float32), "w")],
    )
    domains = {"", node.domain}
    opsets = [helper.make_opsetid(domain, 18 if not domain else 1) for domain in sorted(domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    model.metadata_props.add(key="k", value="v")
    content: bytes = model.SerializeToString()
    return content
