"""Adapters of a model: what is trained of it, and how they are folded into their weights."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.manifests import Role
from splitonnx.names import ADAPTERS
from splitonnx.optimizers import SGD
from splitonnx.partitioner.adaptations import adapt
from splitonnx.partitioner.adapters import (
    Adapter,
    Note,
    fold_adapters,
    read_note,
    write_note,
)
from splitonnx.partitioner.cutting.passes.stored_options import StoredOptions, write_stored
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.remarks import Kind
from splitonnx.verifications import verify
from tests.support.adapted_models import describe, fill, run
from tests.support.nets import Net
from tests.support.zoo import ZOO


@pytest.mark.parametrize("name", ["chain", "attention", "embedding", "dropout"])
def test_folded_adapters_leave_the_nodes_of_the_original_and_predict_alike(name: str) -> None:
    original, data = ZOO[name].build(), ZOO[name].data(4)
    adapted = fill(adapt(original, lora=".", rank=2, alpha=3))
    folded = merge(adapted, fold=True)
    assert describe(folded) == describe(original)
    stored = [tensor.name for tensor in onnx.ModelProto.FromString(folded).graph.initializer]
    assert stored == [tensor.name for tensor in original.graph.initializer]
    if name != "dropout":
        expected = run(adapted, data)
        assert np.abs(expected - run(original, data)).max() > 0.01
        np.testing.assert_allclose(run(folded, data), expected, rtol=1e-6, atol=1e-6)


def test_a_folded_weight_is_the_sum_in_numpy() -> None:
    adapted = fill(adapt(ZOO["chain"].build(), lora="^w1$", rank=2, alpha=3))
    held = {
        tensor.name: numpy_helper.to_array(tensor).astype(np.float64)
        for tensor in onnx.ModelProto.FromString(adapted).graph.initializer
    }
    change = 3 / 2 * (held["w1.lora_A"] @ held["w1.lora_B"])
    folded = onnx.ModelProto.FromString(merge(adapted, fold=True))
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in folded.graph.initializer}
    np.testing.assert_array_equal(weights["w1"], (held["w1"] + change.T).astype(np.float32))
    np.testing.assert_array_equal(weights["w0"], held["w0"].astype(np.float32))


def test_a_bundle_merged_with_fold_is_the_merged_original_with_other_weights() -> None:
    entry = ZOO["attention"]
    adapted, data = fill(adapt(entry.build(), lora="w[qk]", rank=2)), entry.data(4)
    bundle = cut(adapted, at=None, loss=entry.loss)
    plain = merge(cut(entry.build(), at=None, loss=entry.loss))
    folded = merge(bundle, fold=True)
    assert describe(folded) == describe(plain)
    np.testing.assert_allclose(run(folded, data), run(merge(bundle), data), rtol=1e-6, atol=1e-6)
    assert ADAPTERS not in {
        entry.key for entry in onnx.ModelProto.FromString(folded).metadata_props
    }
    again = cut(merge(bundle), at=None, loss=entry.loss)  # the note is still in it
    assert list_roles(again) == list_roles(bundle)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_types_are_folded_in_their_own(dtype: str) -> None:
    code = getattr(onnx.TensorProto, {"float64": "DOUBLE"}.get(dtype, dtype.upper()))
    net = Net()
    kind = onnx.helper.tensor_dtype_to_np_dtype(code)
    weight = np.random.default_rng(1).standard_normal((4, 3)).astype(kind)
    net.weights.append(ir.to_proto(ir.tensor(weight, name="w.weight")))
    net.op("MatMul", "x", "w.weight", out="y")
    model = finish(net, code)
    folded = onnx.ModelProto.FromString(merge(fill(adapt(model, lora="w")), fold=True))
    (tensor,) = folded.graph.initializer
    assert tensor.data_type == code
    assert describe(folded) == describe(model)


def finish(net: Net, code: int) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(
        net.nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", code, ["N", 4])],
        [onnx.helper.make_tensor_value_info("y", code, ["N", 3])],
        net.weights,
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)


def list_roles(bundle: object) -> dict[str, Role]:
    parties = bundle.parties.values()  # type: ignore[attr-defined]
    return {spec.tensor.name: spec.role for party in parties for spec in party.manifest.state}


def test_only_adapters_are_trained_and_only_they_have_gradients_and_optimizer_state() -> None:
    entry = ZOO["attention"]
    adapted = adapt(entry.build(), lora="^w[qk]$", rank=2)
    bundle = cut(adapted, at=None, loss=entry.loss)
    roles = list_roles(bundle)
    trained = {name for name, role in roles.items() if role is Role.PARAMETER}
    assert trained == {"wq.lora_A", "wq.lora_B", "wk.lora_A", "wk.lora_B"}
    moments = [name for name, role in roles.items() if role is Role.OPTIMIZER]
    assert len(moments) == 2 * len(trained)
    graphs = [onnx.load_from_string(graph).graph for graph in bundle.client.graphs.values()]
    made = {name for graph in graphs for node in graph.node for name in node.output}
    gradients = {name.removesuffix("_grad") for name in made if name.endswith("_grad")}
    weights = {name for name, array in bundle.client.weights.items() if array.ndim > 1}
    assert gradients & weights == trained


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"w1.lora_A", "w1.lora_B"}),
        ({"train": ["^b4$"]}, {"w1.lora_A", "w1.lora_B", "b4"}),
        ({"freeze": ["lora_A"]}, {"w1.lora_B"}),
    ],
)
def test_train_and_freeze_choose_beside_and_among_adapters(
    options: dict[str, list[str]], expected: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    adapted = adapt(ZOO["chain"].build(), lora="^w1$", rank=2)
    roles = list_roles(cut(adapted, at=None, **options))  # type: ignore[arg-type]
    assert {name for name, role in roles.items() if role is Role.PARAMETER} == expected
    assert "the model has adapters, and only these are trained: " in caplog.text
    assert ("and beside them 'b4'" in caplog.text) is ("b4" in expected)


def test_what_the_file_says_of_other_weights_does_not_train_them() -> None:
    model = ZOO["chain"].build()
    write_stored(model, StoredOptions(train=("b4",), freeze=("w0",)))
    roles = list_roles(cut(adapt(model, lora="^w1$", rank=2), at=None))
    trained = {name for name, role in roles.items() if role is Role.PARAMETER}
    assert trained == {"w1.lora_A", "w1.lora_B"}


def test_frozen_adapters_leave_what_train_names_or_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    adapted = adapt(ZOO["chain"].build(), lora="^w1$", rank=2)
    with pytest.raises(UsageError, match="train"):
        cut(adapted, at=None, freeze=["lora_"])
    roles = list_roles(cut(adapted, at=None, freeze=["lora_"], train=["^b4$"]))
    assert [name for name, role in roles.items() if role is Role.PARAMETER] == ["b4"]
    assert "which are frozen, and only these are trained: 'b4'; --train REGEX" in caplog.text


@pytest.mark.parametrize("at", ["linear0", "act1", "linear1"])
def test_a_split_trains_adapters_on_either_side_as_the_whole_model(at: str) -> None:
    entry = ZOO["chain"]
    adapted = fill(adapt(entry.build(), lora="^w[12]$", rank=2, alpha=4))
    bundle = cut(adapted, at=at, loss=entry.loss, optimizer=SGD(lr=0.1, momentum=0.9))
    assert verify(bundle, entry.data(40), steps=5, batch_size=8).largest_difference == 0.0


def test_running_statistics_that_are_updated_are_named(caplog: pytest.LogCaptureFixture) -> None:
    adapted = adapt(ZOO["batchnorm_trained"].build(), lora=".", rank=2)
    cut(adapted, at=None)
    assert re.search("the running statistics '.*' are updated, .* --batchnorm frozen", caplog.text)
    caplog.clear()
    cut(adapted, at=None, batchnorm="frozen")
    assert "running statistics" not in caplog.text


def test_check_says_that_adapters_alone_are_trained() -> None:
    adapted = adapt(ZOO["embedding"].build(), lora="^w1$", rank=2)
    found = check(adapted)
    (remark,) = [one for one in found.remarks if one.kind is Kind.ADAPTERS]
    assert remark.names == ("w1.lora_A", "w1.lora_B")
    held = {t.name: t for t in onnx.ModelProto.FromString(adapted).graph.initializer}
    assert found.parameters == sum(int(np.prod(held[name].dims)) for name in remark.names)
    assert not [one for one in check(ZOO["embedding"].build()).remarks if one.kind is Kind.ADAPTERS]


def open_adapted(name: str = "chain") -> ir.Model:
    return open_model(adapt(ZOO[name].build(), lora="^w1$", rank=2))


def test_a_note_that_does_not_fit_the_model_is_refused() -> None:
    model = open_adapted()
    note = read_note(model)
    assert note == Note(
        alpha=2.0, adapters=(Adapter(weight="w1", first="w1.lora_A", second="w1.lora_B"),)
    )
    write_note(model, Note(alpha=1.0, adapters=(Adapter(weight="w", first="a", second="b"),)))
    with pytest.raises(UnsupportedModel, match="names 'a', which the model does not have"):
        read_note(model)
    model.metadata_props[ADAPTERS] = "{}"
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        read_note(model)
    write_note(model, Note(alpha=1.0, adapters=note.adapters, changed=("b\x1b[2J\nremark",)))
    with pytest.raises(UnsupportedModel, match="control characters") as caught:
        read_note(model)
    assert str(caught.value).isprintable()


def test_a_model_without_adapters_has_none_to_fold() -> None:
    with pytest.raises(UsageError, match="no adapters to fold"):
        fold_adapters(open_model(ZOO["chain"].build()))
    with pytest.raises(UsageError, match="fold=True"):
        merge(ZOO["chain"].build())


@pytest.mark.parametrize(
    ("node", "change", "reason"),
    [
        ("linear1_node/lora_scale", "Div", "is not the expected Mul"),
        ("linear1_node", "Sub", "does not add it to a product"),
        ("linear1_node/lora_A", "other", "does not read what node 'linear1_node' reads"),
        ("linear2_node", "weight", "'w1' is also used without it"),
        ("linear1_node/lora", "output", "does not read what node|used"),
    ],
)
def test_an_adapter_that_was_changed_is_not_folded(node: str, change: str, reason: str) -> None:
    model = open_adapted()
    found = next(one for one in model.graph if one.name == node)
    if change == "weight":
        found.replace_input_with(0, model.graph.initializers["w1"])
    elif change == "other":
        found.replace_input_with(0, model.graph.inputs[0])
    elif change == "output":
        model.graph.outputs.append(next(v for v in found.inputs if v is not None))
    else:
        found.op_type = change
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        fold_adapters(model)
    assert re.search("adapter of 'w1'.*leave out --fold", str(caught.value))
