"""Shapes as onnx's own inference gives them, and those that no runtime may be given.

:mod:`inferences` knows more of them; this one types every value that the schemas know.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from splitonnx.errors import NotAModel
from splitonnx.partitioner.drafts import known_dims, known_rank, take_input
from splitonnx.partitioner.faults import blame

_KERNELS = {"Conv": 1, "ConvInteger": 1, "ConvTranspose": 1, "DeformConv": 1, "QLinearConv": 3}
"""Operators with windows, and which of their inputs is the kernel."""
_MOST_DIMENSIONS = 32
_WINDOWED = frozenset({*_KERNELS, "AveragePool", "LpPool", "MaxPool", "MaxUnpool"})


def infer_shapes(model: ir.Model, *, check_type: bool = True) -> None:
    """Note types and shapes on a model's values, in place, as far as onnx infers them.

    Without onnx's propagation of data: that one writes down each element of a vector, so a vector
    of a billion elements takes all memory.  Constants are folded by :mod:`folds` instead.

    Raises:
        NotAModel: onnx infers a type that does not exist.
    """
    try:
        ShapeInferencePass(check_type=check_type, strict_mode=False, data_prop=False)(model)
    except ir.serde.SerdeError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:120]
        raise NotAModel("the model", f"its types cannot be inferred ({reason})") from error


def check_ranks(graph: ir.Graph) -> None:
    """Check that images and kernels have as many dimensions as each other, and none absurdly many.

    So it does that a normalization's axis is one of its input's.  onnx's checker does neither;
    the inference of onnxruntime-training 1.19.2 reads beyond its vectors there, and ends the
    process.

    Raises:
        NotAModel: they differ at a node.
    """
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.shape is not None and len(value.shape) > _MOST_DIMENSIONS:
                reason = f"its output '{value.name}' would have {len(value.shape)} dimensions"
                raise NotAModel(f"node '{node.name}' ({node.op_type})", reason)
        if node.domain not in ("", "ai.onnx"):
            continue
        with blame(node):
            if node.op_type in _WINDOWED:
                _check_window(node)
            elif node.op_type == "LayerNormalization":
                _check_axis(node)


def _check_axis(node: ir.Node) -> None:
    rank, axis = known_rank(take_input(node)), node.attributes.get_int("axis", -1)
    if rank is not None and not -rank <= axis < rank:
        raise NotAModel(
            f"node '{node.name}' ({node.op_type})", f"its input of rank {rank} has no axis {axis}"
        )


def _check_window(node: ir.Node) -> None:
    image, place = node.inputs[0], _KERNELS.get(node.op_type)
    kernel = node.inputs[place] if place is not None else None
    ranks = [len(v.shape) for v in (image, kernel) if v is not None and v.shape is not None]
    for name, share in (("kernel_shape", 1), ("strides", 1), ("dilations", 1), ("pads", 2)):
        values = node.attributes.get_ints(name, [])
        if values:
            ranks.append(len(values) // share + 2)
    if len(set(ranks)) > 1 or any(rank < 3 for rank in ranks):
        raise NotAModel(
            f"node '{node.name}' ({node.op_type})",
            f"its images, kernel and attributes are of {sorted(set(ranks))} dimensions",
        )
    dims = known_dims(kernel) if kernel is not None else None
    if dims is not None and 0 in dims:
        raise NotAModel(f"node '{node.name}' ({node.op_type})", "its kernel is empty")
