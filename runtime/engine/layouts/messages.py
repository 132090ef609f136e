"""Write the few ONNX messages that a rewritten stage graph needs, without the onnx package.

This is the opposite of :mod:`protobufs`, for messages that this package writes itself: nodes,
constants of integers, inputs and outputs.  Nothing is checked here.
(Format: protobuf.dev/programming-guides/encoding; fields: github.com/onnx/onnx, onnx/onnx.proto.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from splitonnx.runtime.gate.protobufs import WireType

_IR_VERSION, _GRAPH, _OPSET = 1, 7, 8
_GRAPH_FIELDS = {
    "node": 1, "name": 2, "initializer": 5, "text": 10, "input": 11, "output": 12, "value": 13,
    "metadata": 16,
}  # fmt: skip
"""The numbers of a graph's fields, by the names that :mod:`schemas` gives them."""
FLOAT, _INT64 = 1, 7
_KIND_INT, _KIND_INTS = 2, 7


def write_number(value: int) -> bytes:
    """Return a non-negative number in base-128 encoding."""
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    written.append(value)
    return bytes(written)


def write_field(number: int, content: bytes | str) -> bytes:
    """Return a field that holds bytes, text or a message."""
    content = content.encode() if isinstance(content, str) else content
    return write_number(number << 3 | WireType.BYTES) + write_number(len(content)) + content


def write_integer(number: int, value: int) -> bytes:
    """Return a field that holds a non-negative number."""
    return write_number(number << 3 | WireType.NUMBER) + write_number(value)


def write_attribute(name: str, value: int | Sequence[int]) -> bytes:
    """Return an attribute that holds one number or several, none of them negative."""
    if isinstance(value, int):
        return write_field(1, name) + write_integer(3, value) + write_integer(20, _KIND_INT)
    numbers = b"".join(write_integer(8, number) for number in value)
    return write_field(1, name) + numbers + write_integer(20, _KIND_INTS)


def write_node(
    operator: str,
    arguments: Iterable[str],
    *results: str,
    name: str = "",
    domain: str = "",
    attributes: Iterable[bytes] = (),
) -> bytes:
    """Return a node; ``attributes`` are messages, as :func:`write_attribute`'s.

    The name of an argument or result that is left out is ``""``.
    """
    fields = [write_field(1, argument) for argument in arguments]
    fields += [write_field(2, result) for result in results]
    fields += [write_field(3, name), write_field(4, operator)]
    fields += [write_field(5, attribute) for attribute in attributes]
    return b"".join([*fields, write_field(7, domain)])


def write_constant(name: str, numbers: Sequence[int]) -> bytes:
    """Return a one-dimensional tensor of 64-bit integers."""
    raw = np.asarray(numbers, "<i8").tobytes()
    dims = write_integer(1, len(numbers))
    return dims + write_integer(2, _INT64) + write_field(8, name) + write_field(9, raw)


def write_value(name: str, shape: Sequence[int] | None, *, code: int | None = FLOAT) -> bytes:
    """Return the declaration of a graph's input or output, by default of type float32.

    ``None`` leaves the shape open, or the type, which only an output may.
    """
    if code is None:
        return write_field(1, name)
    kind = write_integer(1, code)
    if shape is not None:
        kind += write_field(2, b"".join(write_field(1, write_integer(1, dim)) for dim in shape))
    return write_field(1, name) + write_field(2, write_field(1, kind))


def write_opset(domain: str, version: int) -> bytes:
    """Return the import of an operator set."""
    return write_field(1, domain) + write_integer(2, version)


def write_model(
    ir_version: int, opsets: Iterable[bytes], fields: Iterable[tuple[str, bytes]]
) -> bytes:
    """Return a model of a graph with these fields, each with its name, in this order."""
    graph = b"".join(write_field(_GRAPH_FIELDS[name], content) for name, content in fields)
    imports = [write_field(_OPSET, opset) for opset in opsets]
    return b"".join([write_integer(_IR_VERSION, ir_version), *imports, write_field(_GRAPH, graph)])
