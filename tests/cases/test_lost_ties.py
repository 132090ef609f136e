"""One matrix that an exporter stored twice, once of them transposed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from splitonnx.errors import SharedParameter
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS, run_step
from tests.support.derivatives import hold_steps
from tests.support.nets import FLOAT
from tests.support.small_models import hold_predictions, load_data, load_model

NAME = "30_lost_tie"
KEPT, DROPPED = "shared.weight", "onnx::MatMul_1430"
TIE = ((KEPT, DROPPED),)


def tie_by_hand() -> onnx.ModelProto:
    """Load the model with one matrix, which a Transpose turns for its second use."""
    model = load_model(NAME)
    (dropped,) = [t for t in model.graph.initializer if t.name == DROPPED]
    model.graph.initializer.remove(dropped)
    model.graph.node.insert(0, helper.make_node("Transpose", [KEPT], [DROPPED], perm=[1, 0]))
    return model


@pytest.mark.parametrize("target", TARGETS)
def test_a_joined_matrix_gets_the_gradients_of_both_uses(target: Target) -> None:
    data = load_data(NAME)
    bundle = cut(load_model(NAME), at=None, ties=TIE, client_target=target)
    assert DROPPED not in bundle.client.weights
    hold_steps([run_step(bundle, data)], tie_by_hand(), "cross-entropy", data, [KEPT, "w1"])


@pytest.mark.parametrize("target", TARGETS)
def test_a_joined_matrix_predicts_as_the_model_given(target: Target) -> None:
    bundle = cut(load_model(NAME), at=None, ties=TIE, client_target=target, check=True)
    hold_predictions(bundle, load_model(NAME), load_data(NAME))


@pytest.mark.parametrize("target", TARGETS)
def test_a_joined_matrix_stays_at_one_party(target: Target) -> None:
    with pytest.raises(SharedParameter, match=KEPT):
        cut(load_model(NAME), at="a", ties=TIE)
    bundle = cut(
        load_model(NAME), at="e", tail_at="m", ties=TIE, client_target=target, server_target=target
    )
    hold_predictions(bundle, load_model(NAME), load_data(NAME))
    assert verify(bundle, load_data(NAME), batch_size=8).ok


def test_without_the_tie_each_is_trained_apart() -> None:
    bundle = cut(load_model(NAME), at=None)
    assert {KEPT, DROPPED} <= bundle.client.weights.keys()


def test_equal_matrices_are_joined_as_they_are() -> None:
    model = load_model(NAME)
    (kept,) = [t for t in model.graph.initializer if t.name == KEPT]
    twin = numpy_helper.from_array(numpy_helper.to_array(kept), "twin")
    model.graph.initializer.append(twin)
    model.graph.node.append(helper.make_node("Gather", ["twin", "ids"], ["again"]))
    model.graph.output.append(helper.make_tensor_value_info("again", FLOAT, ["N", 5, 6]))
    bundle = cut(model, at=None, ties=((KEPT, "twin"),), check=True)
    assert "twin" not in bundle.client.weights


def test_the_recipe_keeps_the_ties() -> None:
    bundle = cut(load_model(NAME), at=None, ties=TIE)
    assert bundle.manifest.recipe.ties == TIE
    assert np.array_equal(bundle.client.weights[KEPT], bundle.client.state()[KEPT])
