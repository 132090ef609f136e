"""Native code: what onnx and onnxruntime-training compute, behind functions of bytes.

That code takes a model for well-formed where no checker looks, and on one that is not it may end
the process, or corrupt it.  So it runs in a process of its own, which is this module run by
``python -m``; :mod:`workers` starts it and asks.  The only module of the partitioner that
imports onnxruntime-training, of which it uses the pybind layer of 1.19.2 (it needs no torch).  It
knows no cut, and does not check what it is given.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import msgspec
import onnx

SECONDS = 300
"""What one request may take; the process ends with the one that takes more."""
BASE_BYTES = 4 << 30
"""Address space that a request may take beyond what the process has, whatever its size."""
BYTES_PER_BYTE = 64
"""And for each byte of the request: graphs of nodes and shapes are larger than their text."""

MISTAKES = frozenset({"AttributeError", "NameError", "TypeError", "UnboundLocalError"})
"""Kinds of exceptions that say that the call is wrong, not what it was given."""

_LENGTH = struct.Struct("<Q")
"""Before each request and each answer: its length in bytes."""


class StockRuntime(Exception):
    """The installed ONNX Runtime is not onnxruntime-training."""


def check_form(content: bytes) -> None:
    """Check a model and infer its types with onnx, strictly where they contradict each other."""
    onnx.checker.check_model(content)
    onnx.shape_inference.infer_shapes(content, check_type=True, strict_mode=False)


def infer_shapes(content: bytes, check_type: bool) -> bytes:
    """Return the model with the types and shapes that onnx infers, without propagating data."""
    inferred = onnx.shape_inference.infer_shapes(content, check_type=check_type)
    made: bytes = inferred.SerializeToString()
    return made


def infer_node(
    node: bytes, types: Mapping[str, bytes], data: Mapping[str, bytes], opset: int
) -> dict[str, bytes]:
    """Return the types that onnx infers of a node's outputs from those of its inputs."""
    proto = onnx.NodeProto.FromString(node)
    made = onnx.shape_inference.infer_node_outputs(
        onnx.defs.get_schema(proto.op_type, opset, ""),
        proto,
        {name: onnx.TypeProto.FromString(kind) for name, kind in types.items()},
        {name: onnx.TensorProto.FromString(tensor) for name, tensor in data.items()},
        opset_imports=[onnx.helper.make_opsetid("", opset)],
    )
    return {name: kind.SerializeToString() for name, kind in made.items()}


def define(node: bytes, types: Sequence[bytes], version: int, defined: int) -> bytes:
    """Return the function in operators of opset ``defined`` that means what a node means.

    The node is one of opset ``version``, and its inputs of these types.
    """
    kind = onnx.NodeProto.FromString(node).op_type
    schema: Any = onnx.defs.get_schema(kind, version, "")  # onnx's stubs lack its bodies
    body: bytes = schema.get_context_dependent_function_with_opset_version(defined, node, types)
    return body


def optimize(content: bytes, parameters: Sequence[str]) -> bytes:
    """Bring a model to the form that the gradient builder takes."""
    optimized: bytes = _import_builder().get_optimized_model(
        content, set(parameters), _make_options()
    )
    return optimized


def build_gradients(content: bytes, parameters: Sequence[str], loss: str) -> bytes:
    """Return the model with the gradient of ``loss`` to each parameter."""
    options, wanted = _make_options(), set(parameters)
    builder = _import_builder().GradientGraphBuilder(content, {loss}, wanted, loss, options)
    builder.build()
    joint: bytes = builder.get_model()
    return joint


def list_types(content: bytes) -> dict[str, str]:
    """Return the type of each of a model's outputs, as ONNX Runtime writes it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        content, _make_options(), providers=["CPUExecutionProvider"]
    )
    return {output.name: output.type for output in session.get_outputs()}


def _import_builder() -> Any:
    from onnxruntime.capi import _pybind_state

    if not hasattr(_pybind_state, "GradientGraphBuilder"):
        raise StockRuntime("it has no GradientGraphBuilder")
    return _pybind_state


def _make_options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


NATIVES: Mapping[str, tuple[Callable[..., Any], str]] = {
    "build_gradients": (build_gradients, "onnxruntime-training's gradient builder"),
    "check_form": (check_form, "onnx's checker"),
    "define": (define, "onnx's definition of an operator"),
    "infer_node": (infer_node, "onnx's inference of shapes"),
    "infer_shapes": (infer_shapes, "onnx's inference of shapes"),
    "list_types": (list_types, "ONNX Runtime"),
    "optimize": (optimize, "onnxruntime-training's optimizer"),
}
"""What may be asked, by name, and whose code it is."""


def write_frame(sink: BinaryIO, content: bytes) -> None:
    """Write a request or an answer."""
    sink.write(_LENGTH.pack(len(content)))
    sink.write(content)
    sink.flush()


def read_frame(source: BinaryIO) -> bytes:
    """Read a request or an answer.

    Raises:
        EOFError: the other side is gone.
    """
    head = source.read(_LENGTH.size)
    content = source.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""
    if len(head) < _LENGTH.size or len(content) < _LENGTH.unpack(head)[0]:
        raise EOFError
    return content


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer requests, one after the other, until the other side is gone."""
    write_frame(sink, b"")  # ready
    while True:
        try:
            request = read_frame(source)
        except EOFError:
            return
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        _limit_memory(len(request))
        answer = _answer(request)
        faulthandler.cancel_dump_traceback_later()
        write_frame(sink, answer)


def _limit_memory(size: int) -> None:
    """Bound what a request of ``size`` bytes may take, where the system can (Linux).

    macOS knows the limit and does not keep it; Windows has none.
    """
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = taken + BASE_BYTES + BYTES_PER_BYTE * size
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (ImportError, OSError, ValueError):
        return


def _answer(request: bytes) -> bytes:
    """Compute what was asked, or describe the exception that it raises.

    One that is a mistake of ours is told with its traceback.
    """
    try:
        name, arguments = msgspec.msgpack.decode(request)
        return msgspec.msgpack.encode([NATIVES[name][0](*arguments)])
    except Exception as error:  # noqa: BLE001
        kind, told = type(error).__name__, [str(error)]
        if kind in MISTAKES:
            told.append("".join(traceback.format_exception(error)))
        texts = (text.encode(errors="replace").decode() for text in told)
        return msgspec.msgpack.encode([kind, *texts])


def main() -> None:
    """Serve whoever started this process over its standard input and output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a model that ends it leaves no file
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever native code prints is not an answer
    serve(source, sink)


if __name__ == "__main__":
    main()
