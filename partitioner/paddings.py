"""Automatic padding made explicit, before anything else looks at it.

onnxruntime-training's ConvGrad ignores ``auto_pad`` and yields wrong gradients without a word;
with explicit ``pads`` it is right.  Formulas: Conv-11 and MaxPool-12 at onnx.ai/onnx/operators.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.drafts import known_dims
from splitonnx.partitioner.faults import blame

_WINDOWED = frozenset({"AveragePool", "Conv", "LpPool", "MaxPool"})


def settle_paddings(graph: ir.Graph) -> None:
    """Give every convolution and pooling explicit ``pads``, in place.

    Raises:
        UnsupportedModel: the image size that automatic padding depends on is not known.
    """
    for node in graph:
        mode = node.attributes.get_string("auto_pad", "NOTSET")
        if node.op_type not in _WINDOWED or node.domain or mode == "NOTSET":
            continue
        with blame(node):
            kernel = _read_kernel(node)
            pads = [0] * (2 * len(kernel)) if mode == "VALID" else _find_pads(node, mode, kernel)
        del node.attributes["auto_pad"]
        node.attributes["pads"] = ir.AttrInt64s("pads", pads)


def _read_kernel(node: ir.Node) -> list[int]:
    shape = node.attributes.get_ints("kernel_shape", [])
    if shape:
        return list(shape)
    weights = node.inputs[1] if len(node.inputs) > 1 else None
    dims = known_dims(weights) if weights is not None else None
    if dims is None or None in dims:
        raise _refuse(node, "the shape of its kernel")
    return [dim for dim in dims[2:] if dim is not None]


def _find_pads(node: ir.Node, mode: str, kernel: list[int]) -> list[int]:
    source = node.inputs[0]
    dims = known_dims(source) if source is not None else None
    if dims is None or None in dims[2:]:
        raise _refuse(node, "the size of its images")
    ones = [1] * len(kernel)
    strides = node.attributes.get_ints("strides", ones)
    dilations = node.attributes.get_ints("dilations", ones)
    small, large = [], []
    for n, k, s, d in zip(dims[2:], kernel, strides, dilations, strict=True):
        assert n is not None
        total = max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n)
        small.append(total // 2)
        large.append(total - total // 2)
    return [*small, *large] if mode == "SAME_UPPER" else [*large, *small]


def _refuse(node: ir.Node, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"node '{node.name}' ({node.op_type})",
        f"its automatic padding depends on {what}, which is not known",
        "export the model with a fixed image size or explicit pads",
    )
