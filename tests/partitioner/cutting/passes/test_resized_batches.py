"""A Resize to a number of samples or channels that the data need not have."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.cutting.passes.resized_batches import refuse_resized_batches
from splitonnx.partitioner.normalization.opsets import inline_functions


def build(dims: list[int | str], sizes: list[int], *nodes: Any, **attributes: Any) -> ir.Graph:
    """Build a Resize to constant sizes, or to those that other nodes compute as ``to``."""
    resize = helper.make_node(
        "Resize", ["x", "", "", "to" if nodes else "sizes"], ["y"], name="node", **attributes
    )
    graph = helper.make_graph(
        [*nodes, resize],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(sizes), "sizes")],
    )
    opsets = [helper.make_opsetid("", 18)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    inline_functions(model)
    return model.graph


@pytest.mark.parametrize(
    ("dims", "sizes", "attributes", "words"),
    [
        (["N", 3, 4], [2, 3, 8], {}, "a batch of 2"),
        (["N", 3, 4], [2, 8], {"axes": [0, -1]}, "a batch of 2"),
        ([1, "N", 4], [1, 3, 8], {}, "a size along axis 1 of 3"),
    ],
)
def test_it_is_refused_with_the_option_that_fixes_the_size(
    dims: list[int | str], sizes: list[int], attributes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        refuse_resized_batches(build(dims, sizes, **attributes))
    sentence = str(caught.value)
    for part in ("node 'node' (Resize)", words, "'x' has one of any size ('N')", "--dim N="):
        assert part in sentence


@pytest.mark.parametrize(
    ("dims", "sizes", "attributes"),
    [
        ([2, 3, 4], [2, 3, 8], {}),
        ([2, 3, 4], [1, 3, 8], {}),
        (["N", 3, 4], [8], {"axes": [2]}),
        (["N", 3, "T"], [3, 8], {"axes": [1, 2]}),
    ],
)
def test_sizes_of_the_other_axes_and_of_fixed_ones_pass(
    dims: list[int | str], sizes: list[int], attributes: dict[str, Any]
) -> None:
    refuse_resized_batches(build(dims, sizes, **attributes))


def test_sizes_that_the_graph_takes_from_the_data_pass() -> None:
    shape = helper.make_node("Shape", ["x"], ["shape"])
    first = helper.make_node("Slice", ["shape", "zero", "one"], ["first"])
    joined = helper.make_node("Concat", ["first", "sizes"], ["to"], axis=0)
    graph = build(["N", 3, 4], [3, 8], *_constants(zero=0, one=1), shape, first, joined)
    refuse_resized_batches(graph)


def test_a_constant_among_computed_sizes_is_found() -> None:
    shape = helper.make_node("Shape", ["x"], ["shape"])
    last = helper.make_node("Slice", ["shape", "one", "three"], ["last"])
    joined = helper.make_node("Concat", ["sizes", "last"], ["to"], axis=0)
    graph = build(["N", 3, 4], [2], *_constants(one=1, three=3), shape, last, joined)
    with pytest.raises(UnsupportedModel, match="--dim N=2"):
        refuse_resized_batches(graph)


def _constants(**numbers: int) -> list[Any]:
    return [
        helper.make_node("Constant", [], [name], value_ints=[number])
        for name, number in numbers.items()
    ]
