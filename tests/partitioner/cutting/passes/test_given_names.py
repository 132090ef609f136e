"""Names as the user's model has them: to find tensors by, and in what errors say."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from splitonnx.errors import NotDifferentiable, UnknownTensor, UnsupportedModel
from splitonnx.partitioner.cutting.passes.given_names import (
    list_names,
    naming_as_given,
    resolve_names,
)
from splitonnx.partitioner.graphs.traversals import map_values
from tests.support.zoo import ZOO

GIVEN = frozenset({"x", "enc/0", "enc/0/Softplus", "h"})


def test_a_name_means_a_tensor_a_node_or_a_pattern() -> None:
    graph = ir.from_proto(ZOO["chain"].build()).graph
    values = map_values(graph)
    assert resolve_names(graph, ["act1"]) == (values["act1"],)
    assert resolve_names(graph, ["act1_node"]) == (values["act1"],)
    found = [value.name for value in resolve_names(graph, ["act*"])]
    assert found == ["act0", "act1", "act2", "act3"]


def test_a_tensor_that_is_named_twice_is_one() -> None:
    graph = ir.from_proto(ZOO["chain"].build()).graph
    assert [v.name for v in resolve_names(graph, ["act1", "act1_node", "act1*"])] == ["act1"]


def test_a_name_that_fits_nothing_offers_the_nearest() -> None:
    graph = ir.from_proto(ZOO["chain"].build()).graph
    with pytest.raises(UnknownTensor) as caught:
        resolve_names(graph, ["akt1"])
    assert "act1" in caught.value.nearest
    with pytest.raises(UnknownTensor):
        resolve_names(graph, ["nothing*"])


def test_a_pattern_finds_what_was_made_only_where_nothing_given_fits() -> None:
    graph = ir.from_proto(ZOO["chain"].build()).graph
    given = list_names(graph) - {"act2"}
    assert [v.name for v in resolve_names(graph, ["act[12]"], given)] == ["act1"]
    assert [v.name for v in resolve_names(graph, ["act2*"], given)] == ["act2"]


def test_what_was_not_given_is_not_offered() -> None:
    graph = ir.from_proto(ZOO["chain"].build()).graph
    with pytest.raises(UnknownTensor) as caught:
        resolve_names(graph, ["act22"], list_names(graph) - {"act2", "act2_node"})
    assert "act2" not in caught.value.nearest
    assert "act1" in caught.value.nearest


@pytest.mark.parametrize(
    ("made", "given"),
    [
        ("h/rewritten/6", "h"),
        ("h/0_Exp", "h"),
        ("enc/0/Softplus/rewritten1/2_Log", "enc/0/Softplus"),
        ("h_Grad/AveragePoolGrad_0", "h"),
        ("enc/0/unknown", "enc/0/unknown"),  # nothing that a rewrite would make
        ("else/rewritten/6", "else/rewritten/6"),
        ("h", "h"),
    ],
)
def test_an_error_names_what_a_made_name_was_made_from(made: str, given: str) -> None:
    with (
        pytest.raises(UnsupportedModel, match=rf"^node '{given}' \(Exp\): '{given}' is too long"),
        naming_as_given(GIVEN),
    ):
        raise UnsupportedModel(f"node '{made}' (Exp)", f"'{made}' is too long")
    with pytest.raises(NotDifferentiable) as caught, naming_as_given(GIVEN):
        raise NotDifferentiable(made, "Exp")
    assert caught.value.node == given


def test_what_the_user_typed_stays_as_it_is() -> None:
    with pytest.raises(UnknownTensor, match="'h/0_Exp'"), naming_as_given(GIVEN):
        raise UnknownTensor("h/0_Exp")
