"""The gate: hostile and broken models are refused in one line, before anything reads them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from onnx import ModelProto, TensorProto, helper

from splitonnx.errors import ModelError, NotAModel
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from tests.partitioner.gate.broken_models import Breakage, hold_refusal, make_model
from tests.support.zoo import ZOO


def empty_graph(model: ModelProto) -> None:
    del model.graph.node[:]


BROKEN: list[Breakage] = [
    (empty_graph, NotAModel, "no graph"),
]


@pytest.mark.parametrize(
    ("break_it", "kind", "reason"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_model_is_refused_in_one_line(
    break_it: Callable[[ModelProto], None], kind: type[ModelError], reason: str
) -> None:
    hold_refusal(break_it, kind, reason)


def test_a_model_cut_short_is_refused() -> None:
    content = make_model().SerializeToString()
    for length in range(1, len(content), 97):
        with pytest.raises(ModelError):
            open_model(content[:length])


def test_the_callers_model_is_not_changed() -> None:
    from splitonnx.partitioner.partitions import cut

    model = make_model()
    before = model.SerializeToString()
    cut(model, at="act1")
    assert model.SerializeToString() == before


@pytest.mark.parametrize("name", ZOO)
def test_a_good_model_passes(name: str) -> None:
    model = open_model(ZOO[name].build())
    assert [value.name for value in model.graph.outputs] == [
        value.name for value in ZOO[name].build().graph.output
    ]


def test_sizes_that_an_exporter_leaves_open_are_not_equal_to_each_other() -> None:
    dims: list[str | int] = ["N", "?", -1, "?"]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    opsets = [helper.make_opsetid("", 17)]
    opened = open_model(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    for value in (*opened.graph.inputs, *opened.graph.outputs):
        assert value.shape is not None
        assert [dim if isinstance(dim, int) else dim.value for dim in value.shape] == [
            "N", None, None, None,
        ]  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_a_loaded_model_is_not_changed_by_a_cut(name: str) -> None:
    model, given = ZOO[name].build(), ZOO[name].build()
    cut(model, at=None, loss=ZOO[name].loss, check=False)
    assert model == given
