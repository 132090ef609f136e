"""Parameters that hold the same numbers: ties that an export lost, and layers that begin alike."""

from __future__ import annotations

import re
import shlex

import numpy as np
import onnx
import pytest

from splitonnx.errors import UsageError
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.remarks import Remark
from splitonnx.partitioner.reports.ties import remark_on_ties
from tests.support.nets import FLOAT, Net


def build(*weights: tuple[str, np.ndarray]) -> onnx.ModelProto:
    """Multiply by each weight in turn, all 4 x 4."""
    net, value = Net(), "x"
    for index, (name, array) in enumerate(weights):
        value = net.op("MatMul", value, net.constant(name, array), out=f"v{index}")
    return net.finish({"x": (FLOAT, ["N", 4])}, value, 4)


def list_ties(model: onnx.ModelProto) -> list[Remark]:
    return list(remark_on_ties(prepare(open_model(model)), ()))


def draw(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32)


def test_equal_and_transposed_matrices_are_named_with_the_option_that_joins_them() -> None:
    same = draw(1)
    (remark,) = list_ties(
        build(("emb.weight", same), ("w", draw(2)), ("head w", same.T.copy()), ("again", same))
    )
    assert remark.names == ("emb.weight", "head w", "again")
    assert "'head w' (transposed), 'again'" in remark.sentence
    assert [shlex.split(option) for option in remark.options] == [
        ["--tie", "emb.weight=head w"],
        ["--tie", "emb.weight=again"],
    ]


def test_a_symmetric_matrix_is_said_to_fit_both_ways_and_which_way_is_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    even, other = draw(1) + draw(1).T, draw(2)
    model = build(("one", even), ("two", even.copy()))
    (remark,) = list_ties(model)
    assert "'two' (as it is and transposed; --tie takes it as it is) hold" in remark.sentence
    cut(model, at=None, loss="mse", ties=[("one", "two")])
    (said,) = (r.getMessage() for r in caplog.records if "--tie" in r.getMessage())
    assert said.startswith("--tie one=two: the numbers are those of a symmetric matrix")
    caplog.clear()
    plain = build(("one", other), ("two", other.T.copy()))
    cut(plain, at=None, loss="mse", ties=[("one", "two")])
    assert "--tie" not in caplog.text


def test_the_same_numbers_in_another_order_are_no_tie() -> None:
    same = draw(1)
    assert list_ties(build(("a.w", same), ("b.w", np.roll(same, 1, axis=1)))) == []


def test_weights_of_one_number_are_no_tie() -> None:
    ones = np.ones((4, 4), np.float32)
    assert list_ties(build(("a.w", ones), ("b.w", ones))) == []


def test_numbered_layers_may_begin_alike() -> None:
    same = draw(1)
    assert list_ties(build(("layers.0.w", same), ("layers.1.w", same))) == []
    for names in (("left.w", "right.w"), ("onnx::MatMul_1", "onnx::MatMul_2")):
        (remark,) = list_ties(build((names[0], same), (names[1], same)))
        assert remark.names == names


def test_two_sets_of_equal_parameters_are_two_remarks() -> None:
    remarks = list_ties(
        build(("a.w", draw(1)), ("b.w", draw(2)), ("c.w", draw(1)), ("d.w", draw(2)))
    )
    assert [remark.names for remark in remarks] == [("a.w", "c.w"), ("b.w", "d.w")]


def build_decoder(whole: np.ndarray, block: np.ndarray) -> onnx.ModelProto:
    """Read rows of ``whole``, add up what the axes share, and multiply by ``block`` in the end."""
    net = Net()
    net.op("MatMul", "x", net.weight("first", 4, whole.shape[0]), out="h")
    net.op("MatMul", "h", net.constant("E", whole), out="e")
    net.op("MatMul", "e", net.weight("between", whole.shape[1], block.shape[0]), out="b")
    net.op("MatMul", "b", net.constant("decoder", block), out="y")
    return net.finish({"x": (FLOAT, ["N", 4])}, "y", block.shape[1])


TABLE = np.random.default_rng(3).standard_normal((9, 5)).astype(np.float32)
TABLE[0] = 0  # as of a token that pads
BLOCKS = {
    "first 7 rows of 'E' (transposed)": (TABLE, TABLE[:7].T),
    "last 4 rows of 'E',": (TABLE, TABLE[5:]),
    "first 3 columns of 'E',": (TABLE, TABLE[:, :3]),
    "last 2 columns of 'E' (transposed)": (TABLE, TABLE[:, 3:].T),
}


@pytest.mark.parametrize("words", BLOCKS)
def test_a_block_of_another_matrix_is_named_without_an_option(words: str) -> None:
    whole, block = BLOCKS[words]
    (remark,) = list_ties(build_decoder(whole, np.ascontiguousarray(block)))
    assert words in remark.sentence
    assert remark.names == ("decoder", "E")
    assert remark.options == ()


def test_a_matrix_with_more_rows_than_the_embedding_contains_it() -> None:
    more = np.concatenate([TABLE, draw(1)[:3, :1] * np.ones(5, np.float32)])
    (remark,) = list_ties(build_decoder(TABLE, np.ascontiguousarray(more.T)))
    assert remark.names == ("E", "decoder")
    assert "first 9 columns of 'decoder' (transposed)" in remark.sentence


def test_rows_from_the_middle_and_other_numbers_are_no_block() -> None:
    other = TABLE[:7].copy()
    other[3, 2] += 1
    assert list_ties(build_decoder(TABLE, other)) == []
    assert list_ties(build_decoder(TABLE, TABLE[2:4])) == []


def test_weights_that_begin_with_zeros_are_no_blocks() -> None:
    """As in low-rank adapters, of which one half is zero at first."""
    assert (
        list_ties(build_decoder(np.zeros((9, 5), np.float32), np.zeros((5, 7), np.float32))) == []
    )


def build_twins(*, half: bool) -> onnx.ModelProto:
    """Read one table as a matrix, its twin in another shape or type, and its transpose twice."""
    net, table = Net(), draw(1)
    value = net.op("MatMul", "x", net.constant("table", table), out="a")
    if half:
        twin = net.op("Cast", net.constant("twin", table.astype(np.float16)), to=FLOAT, out="wide")
    else:
        twin = net.op("Squeeze", net.constant("twin", table[..., None]),
                      net.constant("axis", np.array([2])), out="flat")  # fmt: skip
    value = net.op("MatMul", value, twin, out="b")
    value = net.op("MatMul", value, net.constant("turned", table.T.copy()), out="c")
    return net.finish({"x": (FLOAT, ["N", 4])}, value, 4)


@pytest.mark.parametrize("half", [False, True])
def test_only_a_tie_that_cut_takes_is_advised(half: bool) -> None:
    model = build_twins(half=half)
    if half:
        rounded = draw(1).astype(np.float16).astype(np.float32)
        for tensor in model.graph.initializer:
            if tensor.name in ("table", "turned"):
                array = rounded if tensor.name == "table" else rounded.T
                tensor.CopyFrom(onnx.numpy_helper.from_array(array.copy(), tensor.name))
    (remark,) = list_ties(model)
    assert set(remark.names) == {"table", "twin", "turned"}
    assert [shlex.split(option) for option in remark.options] == [["--tie", "table=turned"]]
    told = (
        "their types are float32 and float16" if half else "their shapes are [4, 4] and [4, 4, 1]"
    )
    assert f"of 'table' and 'twin', {told}" in remark.sentence
    cut(model, at=None, loss="mse", ties=[("table", "turned")])
    with pytest.raises(UsageError, match=re.escape(told)):
        cut(model, at=None, loss="mse", ties=[("table", "twin")])
