"""Choose what encodes a tensor, by the name of a codec, and say how many bytes that sends."""

from __future__ import annotations

import math

import onnx_ir as ir

from splitonnx.manifests import KEY
from splitonnx.partitioner.cutting.transforms.encodings import Encoding, Piece
from splitonnx.partitioner.cutting.transforms.quantizations import (
    BlockInt4,
    BrainFloat16,
    ChannelInt8,
    Float16,
)
from splitonnx.partitioner.cutting.transforms.sparsifications import RandomTopK, TopK
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.tensors import DTYPES, TensorSpec
from splitonnx.wire_codecs import Codec, CodecKind


def make_encoding(codec: Codec, name: str, key: ir.Value | None) -> Encoding:
    """Return what a codec that is not plain does with the tensor ``name``.

    ``key`` is the random key in the sender's graph.  Without it nothing is drawn at random, as in
    predictions and wherever something is decoded.
    """
    fraction = codec.fraction or 0.0
    match codec.kind:
        case CodecKind.FP16:
            return Float16()
        case CodecKind.BF16:
            return BrainFloat16()
        case CodecKind.INT8:
            return ChannelInt8()
        case CodecKind.INT4:
            return BlockInt4()
        case CodecKind.RANDTOPK if key is not None:
            return RandomTopK(fraction, key, name)
    return TopK(fraction)


def count_bytes(codec: Codec, tensor: TensorSpec) -> int | None:
    """Return how many bytes are sent for a tensor, all of whose sizes are numbers.

    Tensors of other types than float32 are sent as they are.  Return ``None`` if the codec cannot
    encode the tensor.
    """
    if codec.is_plain or tensor.dtype != "F32":
        sizes = [dim for dim in tensor.shape if isinstance(dim, int)]
        return DTYPES[tensor.dtype].itemsize * math.prod(sizes)
    encoding = make_encoding(codec, tensor.name, ir.Value(name=KEY))
    if encoding.refuse(tensor):
        return None
    value = ir.Value(name=tensor.name, type=ir.TensorType(ir.DataType.FLOAT))
    return sum(map(_measure, encoding.encode(NodeBuilder(tensor.name), value, tensor)))


def _measure(piece: Piece) -> int:
    sizes = [dim for dim in piece.shape if isinstance(dim, int)]
    return DTYPES[piece.dtype].itemsize * math.prod(sizes)
