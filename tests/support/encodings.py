"""One codec alone: its nodes that encode and those that decode, run in graphs of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime

from splitonnx.manifests import KEY
from splitonnx.partitioner.cutting.transforms.encodings import Encoding, Piece
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.random_numbers import find_key
from splitonnx.partitioner.graphs.transcripts import write_graph
from splitonnx.tensors import DTYPES, TensorSpec

_TYPES = {"F16": 10, "F32": 1, "I8": 3, "U8": 2, "U16": 4, "I32": 6}
Make = Callable[[ir.Value], Encoding]


def declare(array: np.ndarray) -> TensorSpec:
    """Declare an array with a free first dimension."""
    return TensorSpec(name="x", dtype="F32", shape=("N", *array.shape[1:]))


def encode(make: Make, x: np.ndarray, key: Sequence[int] = (0, 0, 0)) -> dict[str, np.ndarray]:
    """Return what a codec sends for an array, by the ends of its names; check its declarations."""
    spec = declare(x)
    value = _make_value("x", 1, spec.shape)
    graph = ir.Graph([value], [], nodes=[], opset_imports={"": 18}, name="encoder")
    builder = NodeBuilder("encoder")
    pieces = make(find_key(graph)).encode(builder, value, spec)
    for piece in pieces:
        piece.value.name = piece.suffix
        piece.value.type = ir.TensorType(ir.DataType(_TYPES[piece.dtype]))
    graph.extend(builder.nodes)
    graph.outputs.extend(piece.value for piece in pieces)
    made = _run(graph, {"x": x, KEY: np.array(key, np.int64)})
    for piece in pieces:
        _check(piece, made[piece.suffix], len(x))
    return made


def decode(make: Make, sent: Mapping[str, np.ndarray], like: np.ndarray) -> np.ndarray:
    """Return what a codec decodes for an array of the shape of ``like``."""
    spec = declare(like)
    inputs = []
    for name, array in sent.items():
        code = next(_TYPES[n] for n, dtype in DTYPES.items() if dtype == array.dtype)
        inputs.append(_make_value(name, code, [None] * array.ndim))
    builder = NodeBuilder("decoder")
    made = make(ir.Value(name=KEY)).decode(builder, inputs, spec)
    made.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, [made], nodes=builder.nodes, opset_imports={"": 18}, name="decoder")
    return _run(graph, sent)[made.name or ""]


def _make_value(name: str, code: int, dims: Sequence[int | str | None]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType(code)), shape=ir.Shape(dims))


def _check(piece: Piece, array: np.ndarray, rows: int) -> None:
    assert array.dtype == DTYPES[piece.dtype]
    assert array.shape == tuple(rows if dim == "N" else dim for dim in piece.shape)


def _run(graph: ir.Graph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    content = write_graph(graph, 10, "tests").SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    given = {name: array for name, array in feeds.items() if name in wanted}
    return dict(zip(names, session.run(names, given), strict=True))


def run_nodes(build: Callable[[NodeBuilder, ir.Value], ir.Value], x: np.ndarray) -> np.ndarray:
    """Return what a few nodes make of an array."""
    value, builder = _make_value("x", 1, [None] * x.ndim), NodeBuilder("nodes")
    made = build(builder, value)
    made.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([value], [made], nodes=builder.nodes, opset_imports={"": 18}, name="nodes")
    return _run(graph, {"x": x})[made.name or ""]
