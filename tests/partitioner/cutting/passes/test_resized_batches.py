"""A Resize to a number of samples or channels that the data need not have."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.cutting.passes.resized_batches import refuse_resized_batches
from splitonnx.partitioner.normalization.opsets import inline_functions
from splitonnx.partitioner.partitions import cut
from tests.support.small_models import hold_predictions


def build(
    dims: list[int | str | None], sizes: list[int], *nodes: Any, **attributes: Any
) -> ir.Graph:
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
    dims: list[int | str | None], sizes: list[int], attributes: dict[str, Any], words: str
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
    dims: list[int | str | None], sizes: list[int], attributes: dict[str, Any]
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


def test_a_batch_without_a_name_is_fixed_by_its_place() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        refuse_resized_batches(build([None, 3, 4], [2, 3, 8]))
    assert "has one of any size; train with --dim x:0=2, or export it" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "advice"), [(4, "train with --dim N=2, or export it"), (3, "('2*N'); export it")]
)
def test_a_batch_that_was_doubled_is_fixed_where_it_can_be(rows: int, advice: str) -> None:
    model = onnx.parser.parse_model(DOUBLED.format(rows=rows))
    with pytest.raises(UnsupportedModel) as caught:
        cut(model, at="c", loss="mse", check=True)
    assert f"its sizes have a batch of {rows}" in str(caught.value)
    assert advice in str(caught.value)


def test_the_advice_for_a_doubled_batch_works(caplog: pytest.LogCaptureFixture) -> None:
    model = onnx.parser.parse_model(DOUBLED.format(rows=4))
    cut(model, at="c", loss="mse", dims={"N": 2}, check=True)
    assert "differ" not in caplog.text
    assert "does not run" not in caplog.text


DOUBLED = """<ir_version: 8, opset_import: ["" : 18]>
doubled (float[N, 3, 8, 8] x) => (float[M, 3, 1, 1] y)
<float[3, 3, 1, 1] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9}}, int64[4] sizes = {{{rows}, 3, 4, 4}}> {{
    c = Conv (x, w)
    twice = Concat <axis = 0> (c, c)
    resized = Resize <mode = "nearest"> (twice, , , sizes)
    y = GlobalAveragePool (resized)
}}"""


def build_branched(rows: int) -> onnx.ModelProto:
    """Build a model that resizes its images to a number of samples in one branch of an If."""
    told, random = helper.make_tensor_value_info, np.random.default_rng(0)
    node = helper.make_node
    branches = {
        "then_branch": node("Resize", ["h", "", "", "sizes"], ["a"], name="inner"),
        "else_branch": node("Tanh", ["h"], ["a"], name="other"),
    }
    bodies = {
        name: helper.make_graph([made], name, [], [told("a", TensorProto.FLOAT, [None] * 4)])
        for name, made in branches.items()
    }
    weights = {"k": random.standard_normal((3, 2, 1, 1)), "zero": np.array(0)}
    graph = helper.make_graph(
        [
            node("Conv", ["x", "k"], ["h"], name="conv"),
            node("ReduceMean", ["h"], ["mean"], name="mean", keepdims=0),
            node("Greater", ["mean", "zero"], ["asks"], name="asks"),
            node("If", ["asks"], ["r"], name="if", **bodies),
            node("GlobalAveragePool", ["r"], ["p"], name="pool"),
            node("Flatten", ["p"], ["y"], name="flatten"),
        ],
        "g",
        [told("x", TensorProto.FLOAT, ["N", 2, 4, 4])],
        [told("y", TensorProto.FLOAT, ["N", 3])],
        [
            *(numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()),
            numpy_helper.from_array(np.array([rows, 3, 6, 6]), "sizes"),
        ],
    )
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("check", [True, False])
def test_one_in_a_branch_is_refused_with_the_option_that_helps(rows: int, *, check: bool) -> None:
    model = build_branched(rows)
    with pytest.raises(UnsupportedModel) as caught:
        cut(model, at="h", check=check)
    told = f"node 'inner' (Resize): its sizes have a batch of {rows}"
    assert str(caught.value).startswith(told)
    assert f"--dim N={rows}" in str(caught.value)
    x = np.random.default_rng(1).standard_normal((rows, 2, 4, 4)).astype(np.float32)
    bundle = cut(model, at="h", dims={"N": rows}, check=check)
    for data in (x, -x):  # one branch each
        hold_predictions(bundle, model, {"x": data})
