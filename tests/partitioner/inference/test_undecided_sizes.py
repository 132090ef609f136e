"""Why a condition is not known: the data decide, or sizes that the user can fix."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.inference.inferences import Inference
from splitonnx.partitioner.inference.shapes import infer_shapes
from splitonnx.partitioner.inference.undecided_sizes import (
    explain_unknown,
    explain_unknown_rank,
    list_open_sizes,
    list_options,
    list_settings,
    name_settings,
    name_sizes,
)

TEXT = """<ir_version: 8, opset_import: ["" : 18]>
g (float[N,T,4] x, float[N,M] z, float[?,2] u, int64[2] s, float t0, int64[N] r, int64[9] w)
=> (bool a, bool b, bool c, bool d, bool e, bool f, bool g, bool h, bool i, bool j) {
    one = Constant <value = int64 {1}> ()
    three = Constant <value = int64 {3}> ()
    sizes = Shape (x)
    t = Gather (sizes, one)
    a = Greater (t, three)
    count = Size (z)
    half = Div (count, three)
    b = Greater (half, three)
    total = ReduceSum <keepdims = 0> (x)
    limit = Constant <value_float = 1.0> ()
    c = Greater (total, limit)
    length = Shape <end = 1> (u)
    d = Greater (length, three)
    e = Constant <value_int = 1> ()
    rate = Gather (s, one)
    f = Greater (rate, three)
    moved = Mul (t0, limit)
    g = Greater (moved, limit)
    rates = CastLike (rate, t0)
    h = Greater (rates, t0)
    i = Greater (r, three)
    j = Greater (w, rate)
}
"""


RANKS = """<ir_version: 8, opset_import: ["" : 18]>
g (float[N,1,2] x, float[M] z, int64[R] target) => (float[] a, float[] b, float[] c) {
    q = Squeeze (x)
    a = Relu (q)
    r = Reshape (z, target)
    b = Neg (r)
    c = Tanh (x)
}
"""


def test_the_node_from_which_on_the_rank_is_unknown_is_named_with_the_sizes_that_decide() -> None:
    values = map_values(ir.from_onnx_text(RANKS).graph)
    for name in ("q", "a", "r", "b"):
        values[name].shape = None
    said = explain_unknown_rank(values["a"])
    assert "(Squeeze) has no axes and drops each axis of size 1" in said
    assert "depends on the size 'N', which --dim N=SIZE fixes" in said
    said = explain_unknown_rank(values["b"])
    assert "the rank of what node" in said
    assert "(Reshape) computes is not known" in said
    assert explain_unknown_rank(values["x"]) == ""


@pytest.fixture
def found() -> tuple[ir.Graph, Inference]:
    model = ir.from_onnx_text(TEXT)
    infer_shapes(model)
    graph = model.graph
    known = Inference(18)
    for node in graph:
        known.visit(node)
    return graph, known


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("a", ["T"]), ("b", ["N", "M"]), ("c", []), ("d", ["u:0"]), ("e", []), ("x", [])],
)
def test_the_sizes_are_those_that_the_value_depends_on(
    found: tuple[ir.Graph, Inference], name: str, sizes: list[str]
) -> None:
    graph, known = found
    assert list_open_sizes(map_values(graph)[name], graph, known) == sizes


def test_it_is_said_whether_sizes_or_the_data_decide(found: tuple[ir.Graph, Inference]) -> None:
    graph, known = found
    values = map_values(graph)
    told = explain_unknown(values["a"], graph, known)
    assert told == "depends on the size 'T', which --dim T=SIZE fixes"
    assert explain_unknown(values["c"], graph, known) == "depends on the data"
    assert explain_unknown(None, graph, known) == "depends on the data"


def test_a_size_within_a_quotient_counts(found: tuple[ir.Graph, Inference]) -> None:
    graph, _ = found
    assert list_options({"(T + -1)//(2)"}, graph) == ["T"]
    assert list_options({"Total"}, graph) == []


def test_several_sizes_are_fixed_by_an_option_each() -> None:
    assert name_sizes(["H", "W"]) == "the sizes 'H', 'W', which --dim H=SIZE --dim W=SIZE fix"


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("f", ["s"]), ("g", ["t0"]), ("h", ["s", "t0"]), ("i", []), ("j", []), ("c", []),
        ("a", []), ("e", []), ("s", ["s"]),
    ],
)  # fmt: skip
def test_scalars_and_few_integers_may_be_settings(
    found: tuple[ir.Graph, Inference], name: str, inputs: list[str]
) -> None:
    graph, _ = found
    assert list_settings(map_values(graph)[name], graph.inputs) == inputs


def test_the_option_that_fixes_a_setting_is_named(found: tuple[ir.Graph, Inference]) -> None:
    graph, known = found
    told = explain_unknown(map_values(graph)["f"], graph, known)
    assert told == "depends on the input 's', which --bind s=VALUE fixes"
    told = name_settings(["a b", "c"])
    assert told == "the inputs 'a b', 'c', which --bind 'a b'=VALUE --bind c=VALUE fix"
