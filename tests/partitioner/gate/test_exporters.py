"""What PyTorch's exporters left out is found by its traces, and answered with a call."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.gate.exporters import (
    CHECKED,
    OmissionKind,
    advise,
    describe_call,
    list_omissions,
)
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from tests.end_to_end.test_exports import FOLDER

JOINED, LOST = OmissionKind.JOINED_PARAMETERS, OmissionKind.LOST_DROPOUT
COMPUTED, FROZEN = OmissionKind.COMPUTED_WEIGHTS, OmissionKind.FROZEN_BATCHNORM
FOLDED, FIXED = OmissionKind.FOLDED_BATCHNORM, OmissionKind.FIXED_BATCH


def load(name: str) -> onnx.ModelProto:
    return onnx.load(FOLDER / f"{name}.onnx")


def list_kinds(model: onnx.ModelProto) -> list[OmissionKind]:
    return [omission.kind for omission in list_omissions(open_model(model))]


def build(
    nodes: Sequence[onnx.NodeProto], weights: dict[str, np.ndarray], batch: int | str = "N"
) -> onnx.ModelProto:
    """Build a model from x (batch, 4, 3) to y (batch, 4, 3), as if by PyTorch."""
    shape = [batch, 4, 3]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(array.astype(np.float32), name)
            for name, array in weights.items()
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, producer_name="pytorch", opset_imports=opsets, ir_version=8)


def build_norms(second: str) -> onnx.ModelProto:
    """Two LayerNormalizations that read the first one's weight, the other in module ``second``."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "norm1.weight"], ["h"], name="n1"),
        helper.make_node("LayerNormalization", ["h", "norm1.weight"], ["y"], name="n2"),
    ]
    for node, module in zip(nodes, ("norm1", second), strict=True):
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', '{module}', 'op']")
    return build(nodes, {"norm1.weight": np.ones(3)})


def build_recurrent(between: str) -> onnx.ModelProto:
    """Two layers of an RNN over (4, batch, 3), as exported from nn.RNN(num_layers=2)."""
    weights = {f"{kind}{n}": np.ones((1, 3, 3)) for kind in "wr" for n in (1, 2)}
    weights["p"], weights["on"] = np.array(0.2), np.array(0.0)
    nodes = [
        helper.make_node("RNN", ["x", "w1", "r1"], ["h1"], name="rnn1", hidden_size=3),
        helper.make_node("Squeeze", ["h1", "axis"], ["s1"]),
        helper.make_node(between, ["s1"], ["b1"]),
        helper.make_node("RNN", ["b1", "w2", "r2"], ["h2"], name="rnn2", hidden_size=3),
        helper.make_node("Squeeze", ["h2", "axis"], ["y"]),
    ]
    model = build(nodes, weights)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    return model


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("torch-cnn-legacy", []),
        ("torch-recurrent-legacy", []),
        ("torch-transformer-dynamo", []),
        ("torch-cnn-legacy-default", [FOLDED, COMPUTED]),
        ("torch-cnn-dynamo", [FROZEN]),
        ("torch-recurrent-dynamo-default", [COMPUTED]),
        ("torch-transformer-legacy-default", [COMPUTED, JOINED]),
        ("keras-cnn", []),
    ],
)
def test_each_export_is_found_to_lack_what_it_lacks(name: str, kinds: list[OmissionKind]) -> None:
    assert list_kinds(load(name)) == kinds


@pytest.mark.parametrize(
    "name",
    ["mul", "mul_9", "div", "_weight_norm_1", "/Mul_output_0", "/a/b/Div_1_output_0"],
)
def test_a_weight_named_like_a_result_was_computed_by_the_exporter(name: str) -> None:
    node = [helper.make_node("MatMul", ["x", name], ["y"])]
    (omission,) = list_omissions(open_model(build(node, {name: np.eye(3)})))
    assert omission.kind is COMPUTED
    assert omission.names == (name,)
    assert "would be trained freely in place of the parameters behind it" in omission.sentence


@pytest.mark.parametrize("name", ["scale", "mul_a", "a.mul", "multi", "/Constant_1_output_0"])
def test_other_names_are_those_of_parameters(name: str) -> None:
    node = [helper.make_node("MatMul", ["x", name], ["y"])]
    assert list_kinds(build(node, {name: np.eye(3)})) == []


def test_a_mask_named_like_a_result_was_not_computed_from_parameters() -> None:
    for mask in (np.ones((3, 3)), np.where(np.eye(3) > 0, 0, -np.inf)):
        node = [helper.make_node("Add", ["x", "mul"], ["y"])]
        assert list_kinds(build(node, {"mul": mask})) == []


def test_a_batch_that_the_example_fixed_is_found() -> None:
    node = [helper.make_node("Relu", ["x"], ["y"])]
    (omission,) = list_omissions(open_model(build(node, {}, batch=1)))
    assert omission.kind is FIXED
    assert omission.sentence == "the batch is fixed at 1 by 'x'"
    assert list_kinds(build(node, {})) == []


def test_batchnorm_that_dynamo_folded_is_found_by_the_rule_that_folded_it() -> None:
    model = load("torch-cnn-dynamo-default")
    assert FOLDED not in list_kinds(model)  # its notes were stripped
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    conv.metadata_props.add(key="pkg.onnxscript.rewriter.rule_name", value="FuseBatchNormIntoConv")
    omission = list_omissions(open_model(model))[0]
    assert (omission.kind, omission.names) == (FOLDED, (conv.name,))


def test_parameters_of_equal_numbers_that_became_one_are_named() -> None:
    omission = list_omissions(open_model(load("torch-transformer-legacy-default")))[-1]
    prefix = "encoder.layers.0"
    assert f"'{prefix}.norm1.weight' as '{prefix}.norm2.weight'" in omission.sentence
    assert f"{prefix}.self_attn.out_proj.bias" in omission.names


def test_one_weight_in_two_modules_was_joined_but_a_module_called_twice_was_not() -> None:
    (omission,) = list_omissions(open_model(build_norms("norm2")))
    assert omission.kind is JOINED
    assert omission.names == ("norm1.weight", "n2")
    assert list_kinds(build_norms("norm1")) == []


def build_batchnorm(*inputs: str, node: str = "n") -> onnx.ModelProto:
    """A BatchNormalization over 4 channels that reads these tensors of equal numbers."""
    made = helper.make_node("BatchNormalization", ["x", *inputs], ["y"], name=node)
    return build([made], {name: np.ones(4) for name in inputs})


def test_a_scale_that_is_its_own_offset_is_named_and_a_statistic_is_not() -> None:
    model = build_batchnorm("bn.weight", "bn.weight", "bn.running_mean", "bn.weight")
    joined = list_omissions(open_model(model))[-1]
    assert (joined.kind, joined.names) == (JOINED, ("bn.weight", "n"))
    apart = build_batchnorm("bn.weight", "bn.bias", "bn.bias", "bn.weight")
    assert list_kinds(apart) == [FROZEN]  # preparation keeps the statistics apart


def test_an_identity_that_only_renames_a_statistic_joins_no_parameters() -> None:
    model = build_batchnorm("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    del model.graph.initializer[-1]
    renamed = helper.make_node("Identity", ["bn.weight"], ["bn.running_var"])
    model.graph.node.insert(0, renamed)
    assert list_kinds(model) == [FROZEN]


def test_recurrent_layers_without_dropout_may_have_lost_it() -> None:
    model = open_model(build_recurrent("Identity"))
    assert [o.kind for o in list_omissions(model)] == []  # something else is between them
    (omission,) = list_omissions(open_model(build_recurrent("Transpose")))
    assert omission.kind is LOST
    assert omission.names == ("rnn1", "rnn2")
    assert list_kinds(build_recurrent("Dropout")) == []


def test_the_call_is_dynamo_s_where_the_legacy_exporter_refuses() -> None:
    assert "dynamo=True" in describe_call(open_model(build_recurrent("Transpose")), {LOST})
    assert "dynamo=True" in describe_call(open_model(build_recurrent("Dropout")), {COMPUTED})
    call = describe_call(open_model(load("torch-cnn-legacy-default")), {FOLDED})
    assert "dynamo=False" in call
    assert "input_names=['image'], dynamic_axes={'image': {0: 'N'}}" in call


def test_a_name_that_the_exporter_made_up_is_not_repeated_in_the_call() -> None:
    model = load("torch-cnn-legacy-default")
    model.graph.input[0].name = model.graph.node[0].input[0] = "onnx::Conv_0"
    assert "input_names=['input_0']" in describe_call(open_model(model), {FOLDED})


def test_other_exporters_and_what_splitonnx_exported_are_left_alone() -> None:
    model = load("torch-cnn-legacy-default")
    model.metadata_props.add(key=CHECKED, value="0.1.0")
    assert list_kinds(model) == []
    del model.metadata_props[:]
    model.producer_name = "tf2onnx"
    assert list_kinds(model) == []


def test_cut_says_in_one_line_what_is_missing_and_both_calls(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        cut(load("torch-cnn-legacy-default"), at=None)
    (line,) = caplog.messages
    opened = open_model(load("torch-cnn-legacy-default"))
    assert line == advise(opened, list_omissions(opened))
    assert "BatchNormalization was folded into" in line
    assert "splitonnx.torch.export(model, example, 'model.onnx'), or with torch.onnx.ex" in line


def test_cut_says_nothing_of_batchnorm_whose_mode_the_user_chose(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = load("torch-cnn-dynamo")
    with caplog.at_level(logging.WARNING):
        cut(model, at=None)
        assert "2 BatchNormalization nodes are in inference mode" in caplog.text
        caplog.clear()
        cut(model, at=None, batchnorm="train")
        cut(model, at=None, batchnorm="frozen")
    assert not [line for line in caplog.messages if "inference mode" in line]
