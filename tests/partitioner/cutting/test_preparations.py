"""A model in its two forms: one to train, one to predict, under the same names."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.manifests import KEY, Role
from splitonnx.partitioner.cutting.preparations import PreparedModel, list_trained, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.normalization.weights import read_array
from tests.support.zoo import FLOAT, ZOO, Net


def prepare_entry(name: str, **settings: object) -> PreparedModel:
    return prepare(open_model(ZOO[name].build()), **settings)  # type: ignore[arg-type]


def list_kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("name", ["chain", "attention", "shape_paths", "pools", "embedding"])
def test_the_inference_form_computes_what_the_model_does(name: str) -> None:
    entry = ZOO[name]
    data = entry.data(3)
    feeds = {key: data[key] for key in entry.inputs}
    (expected,) = ReferenceEvaluator(entry.build()).run(None, feeds)
    prepared = prepare_entry(name)
    weights = {key: read_array(tensor) for key, tensor in prepared.weights.items()}
    used = {value.name for value in prepared.inference.graph.inputs}
    feeds |= {key: array for key, array in weights.items() if key in used}
    (found,) = ReferenceEvaluator(ir.to_proto(prepared.inference)).run(None, feeds)
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-6)


def test_weights_leave_the_graph_and_become_inputs() -> None:
    prepared = prepare_entry("chain")
    stored = [tensor.name for tensor in ZOO["chain"].build().graph.initializer]
    assert list(prepared.weights) == stored
    for form in (prepared.training, prepared.inference, prepared.skeleton):
        assert not set(form.graph.initializers) & set(stored)
        assert {value.name for value in form.graph.inputs} >= {"x", *stored}


def test_both_forms_share_every_name_of_the_model() -> None:
    model = ZOO["residual"].build()
    names = {output for node in model.graph.node for output in node.output}
    prepared = prepare_entry("residual")
    for form in (prepared.training, prepared.inference, prepared.skeleton):
        assert names <= map_values(form.graph).keys()


def test_batchnorm_trains_in_one_form_and_predicts_in_the_other() -> None:
    prepared = prepare_entry("batchnorm_trained")
    assert {n.attributes.get_int("training_mode", 0) for n in prepared.training.graph
            if n.op_type == "BatchNormalization"} == {1}  # fmt: skip
    assert {n.attributes.get_int("training_mode", 0) for n in prepared.inference.graph
            if n.op_type == "BatchNormalization"} == {0}  # fmt: skip
    assert set(prepared.next_buffers) == {
        name for name, role in prepared.roles.items() if role is Role.BUFFER
    }


@pytest.mark.parametrize(
    ("name", "mode", "trains"),
    [
        ("batchnorm_trained", None, True),
        ("batchnorm_trained", "frozen", False),
        ("batchnorm_frozen", None, False),
        ("batchnorm_frozen", "train", True),
    ],
)
def test_batchnorm_is_as_it_says_itself_unless_the_user_says_otherwise(
    name: str, mode: str | None, trains: bool
) -> None:
    prepared = prepare_entry(name, batchnorm=mode)
    assert ("BatchNormalization" in list_kinds(prepared.training)) is trains
    assert bool(prepared.next_buffers) is trains
    statistics = {prepared.roles[n] for n in prepared.roles if n.endswith((".mean", ".var"))}
    assert statistics == {Role.BUFFER if trains else Role.FROZEN}


def test_dropout_is_gone_from_prediction_and_drawn_by_a_key_in_training() -> None:
    prepared = prepare_entry("dropout")
    assert KEY in {value.name for value in prepared.training.graph.inputs}
    assert KEY not in {value.name for value in prepared.inference.graph.inputs}
    assert "Dropout" not in list_kinds(prepared.inference)
    assert KEY in prepared.state
    off = prepare_entry("dropout", dropout="off")
    assert KEY not in {value.name for value in off.training.graph.inputs}


def test_patterns_choose_what_is_trained() -> None:
    assert prepare_entry("chain").trainable == tuple(prepare_entry("chain").weights)
    frozen = prepare_entry("chain", freeze=["^b", "w0"])
    assert frozen.trainable == ("w1", "w2", "w3", "w4")
    both = prepare_entry("chain", freeze=["^b"], train=["^b1$"])
    assert [name for name in both.trainable if name.startswith("b")] == ["b1"]


def test_only_what_the_outputs_depend_on_is_trained() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        heads (float[N, 2] x) => (float[N, 2] a, float[N, 2] b)
        <float[2, 2] w = {1, 2, 3, 4}, float[2, 2] v = {1, 2, 3, 4}, float[2, 2] u = {1, 2, 3, 4}>
        { h = MatMul (x, w)  a = MatMul (h, v)  b = MatMul (h, u) }"""
    )
    prepared = prepare(open_model(model))
    assert list_trained(prepared, ["a"]) == ["w", "v"]
    assert list_trained(prepared, ["a", "b"]) == ["w", "v", "u"]


def test_patterns_without_an_effect_are_refused() -> None:
    with pytest.raises(UsageError):
        prepare_entry("chain", freeze=["("])
    with pytest.raises((UsageError, UnsupportedModel), match="nothing_like_it"):
        prepare_entry("chain", freeze=["nothing_like_it"])
    with pytest.raises((UsageError, UnsupportedModel), match="nothing_like_it"):
        prepare_entry("chain", train=["nothing_like_it"])


def test_nodes_without_a_name_or_with_the_same_get_their_own() -> None:
    net = Net()
    hidden = net.op("Relu", net.op("MatMul", "x", net.weight("w", 6, 5), out="m"), out="h")
    net.op("Relu", net.op("MatMul", hidden, net.weight("v", 5, 3), out="n"), out="y")
    for node in net.nodes:
        node.name = "" if node.op_type == "MatMul" else "same"
    prepared = prepare(open_model(net.finish({"x": (FLOAT, ["N", 6])}, "y", 3)))
    names = [node.name for node in prepared.skeleton.graph]
    assert len(set(names)) == len(names) == 4
    assert all(names)
    assert "same" in names


def test_outputs_of_text_and_of_no_data_are_dropped() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 6, 3), out="y")
    net.op("Identity", net.constant("fixed", np.ones(2, np.float32)), out="constant")
    model = net.finish({"x": (FLOAT, ["N", 6])}, "y", 3)
    model.graph.output.append(helper.make_tensor_value_info("constant", FLOAT, [2]))
    onnx.checker.check_model(model)
    prepared = prepare(open_model(model))
    assert [value.name for value in prepared.inference.graph.outputs] == ["y"]
    assert [value.name for value in prepared.training.graph.outputs] == ["y"]
    assert [value.name for value in prepared.skeleton.graph.outputs] == ["y", "constant"]


def test_statistics_that_the_graph_computes_cannot_be_kept() -> None:
    net = Net()
    net.batchnorm("x", 4, out="n", training=True)
    net.nodes.insert(0, helper.make_node("Relu", ["n.bn.mean"], ["computed"], name="relu"))
    net.nodes[1].input[3] = "computed"
    net.op("MatMul", "n", net.weight("w", 4, 3), out="y")
    model = net.finish({"x": (FLOAT, ["N", 4])}, "y", 3)
    with pytest.raises(UnsupportedModel, match=r"'computed'.*--batchnorm frozen|cannot be"):
        prepare(open_model(model))
