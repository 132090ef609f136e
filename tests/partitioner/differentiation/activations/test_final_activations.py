"""A loss that contains the model's last activation is taken before it.

tests/cases/test_last_activations.py tries what may stand behind the activation.
"""

from __future__ import annotations

import onnx
import pytest
from onnx import helper

from splitonnx.partitioner.differentiation.activations.final_activations import find_activation
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from tests.partitioner.differentiation.test_losses import open_client
from tests.support.zoo import ZOO


def ending_in(kind: str, name: str) -> onnx.ModelProto:
    model = ZOO[name].build()
    scores = model.graph.output[0].name
    model.graph.node.append(helper.make_node(kind, [scores], ["probabilities"], name="last"))
    model.graph.output[0].name = "probabilities"
    return model


@pytest.mark.parametrize(("kind", "name"), [("Softmax", "chain"), ("Sigmoid", "bce")])
def test_a_loss_that_contains_the_last_activation_is_taken_before_it(kind: str, name: str) -> None:
    entry = ZOO[name]
    data = entry.data(40)
    results = []
    for model in (entry.build(), ending_in(kind, name)):
        with open_client(cut(model, at="act1", loss=entry.loss)) as client:
            history = client.fit(data, batch_size=8)
            evaluation = client.evaluate(data)
            results.append(([record.loss for record in history.steps], evaluation))
            (predicted,) = client.predict({"x": data["x"]}).values()
    assert results[0][0] == results[1][0]
    assert results[0][1]["loss"] == pytest.approx(results[1][1]["loss"], rel=1e-4)
    assert results[0][1]["accuracy"] == results[1][1]["accuracy"]
    assert predicted.min() >= 0
    assert predicted.max() <= 1


@pytest.mark.parametrize(
    ("kind", "loss", "axis", "found"),
    [
        ("Softmax", "cross-entropy", 1, True),
        ("Softmax", "cross-entropy", 2, False),
        ("Softmax", "mse", 1, False),
        ("Sigmoid", "bce-with-logits", 1, True),
        ("Sigmoid", "cross-entropy", 1, False),
        ("Tanh", "cross-entropy", 1, False),
    ],
)
def test_an_activation_is_found_where_the_loss_applies_it_over_the_same_axis(
    kind: str, loss: str, axis: int, found: bool
) -> None:
    opened = open_model(onnx.shape_inference.infer_shapes(ending_in(kind, "chain")))
    activation = find_activation(opened.graph.outputs[0], loss, axis)
    assert (activation is not None) == found
