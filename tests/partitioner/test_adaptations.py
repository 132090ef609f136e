"""Adapters are added to a model, which computes the same until they are trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from splitonnx.errors import UnsupportedModel, UnwritableFile, UsageError
from splitonnx.partitioner import model_files
from splitonnx.partitioner.adaptations import adapt, write_adapted
from splitonnx.partitioner.adapters import read_note
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.merges import merge, write_adapters
from tests.support.adapted_models import describe, fill, read_weights, run
from tests.support.nets import FLOAT, Net
from tests.support.zoo import ZOO


@pytest.mark.parametrize("name", ["chain", "attention", "embedding", "residual", "shape_paths"])
def test_a_model_that_was_just_adapted_computes_what_it_did(name: str) -> None:
    original, data = ZOO[name].build(), ZOO[name].data(4)
    before = original.SerializeToString(deterministic=True)
    content = adapt(original, lora=".", rank=3, alpha=6)
    assert original.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(onnx.ModelProto.FromString(content), full_check=True)
    np.testing.assert_array_equal(run(content, data), run(original, data))


@pytest.mark.parametrize("name", ["chain", "attention"])
def test_adapters_add_their_product_to_the_result(name: str) -> None:
    """An outside judge: the weights that numpy makes of weight and adapter, in the original."""
    original, data = ZOO[name].build(), ZOO[name].data(4)
    content = fill(adapt(original, lora=".", rank=3, alpha=6))
    held = read_weights(content)
    products = {n.input[1]: n for n in original.graph.node if n.op_type in ("Gemm", "MatMul")}
    for tensor in original.graph.initializer:
        if f"{tensor.name}.lora_A" in held:
            change = 2.0 * held[f"{tensor.name}.lora_A"] @ held[f"{tensor.name}.lora_B"]
            turned = any(a.name == "transB" and a.i for a in products[tensor.name].attribute)
            array = numpy_helper.to_array(tensor) + (change.T if turned else change)
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    np.testing.assert_allclose(run(content, data), run(original, data), rtol=1e-5, atol=1e-5)


def test_a_gemm_with_a_factor_of_its_own_scales_the_adapter_too() -> None:
    net = Net()
    net.op("Gemm", "x", net.weight("w", 4, 3), net.weight("b", 3), out="y", alpha=0.5, beta=2.0)
    model = net.finish({"x": (FLOAT, ["N", 4])}, "y", 3)
    content = fill(adapt(model, lora="w", rank=2, alpha=3))
    held, x = read_weights(content), np.random.default_rng(1).standard_normal((5, 4), np.float32)
    whole = held["w"] + 1.5 * held["w.lora_A"] @ held["w.lora_B"]
    expected = 0.5 * x @ whole + 2 * held["b"]
    for made in (content, merge(content, fold=True)):
        np.testing.assert_allclose(run(made, {"x": x}), expected, rtol=1e-5, atol=1e-6)


def test_a_weight_of_two_products_has_one_adapter() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w.weight", 4, 4), out="h")
    net.op("MatMul", "h", "w.weight", out="y")
    model = net.finish({"x": (FLOAT, ["N", 4])}, "y", 4)
    content = fill(adapt(model, lora="w", rank=2))
    held, x = read_weights(content), np.eye(4, dtype=np.float32)
    whole = held["w.weight"] + held["w.lora_A"] @ held["w.lora_B"]
    np.testing.assert_allclose(run(content, {"x": x}), whole @ whole, rtol=1e-5, atol=1e-5)
    folded = merge(content, fold=True)
    np.testing.assert_allclose(read_weights(folded)["w.weight"], whole, rtol=1e-6, atol=1e-6)


def test_a_weight_in_a_constant_node_can_have_an_adapter() -> None:
    net = Net()
    weight = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight, "w"))
    net.nodes.append(constant)
    net.op("MatMul", "x", "w", out="y")
    model = net.finish({"x": (FLOAT, ["N", 4])}, "y", 3)
    content = fill(adapt(model, lora="^w$", rank=2))
    held, x = read_weights(content), np.eye(4, dtype=np.float32)
    folded = merge(content, fold=True)
    for made in (content, folded):
        expected = weight + held["w.lora_A"] @ held["w.lora_B"]
        np.testing.assert_allclose(run(made, {"x": x}), expected, rtol=1e-5, atol=1e-6)
    assert [n.op_type for n in onnx.ModelProto.FromString(folded).graph.node] == [
        "Constant",
        "MatMul",
    ]


def test_adapters_start_as_those_of_peft_do() -> None:
    held = read_weights(adapt(ZOO["chain"].build(), lora="w[01]", rank=50, seed=5))
    first, second = held["w0.lora_A"], held["w0.lora_B"]
    assert (first.shape, second.shape) == ((6, 50), (50, 8))
    assert not second.any()
    bound = 1 / np.sqrt(6)  # kaiming_uniform_(a=sqrt(5)): sqrt(6 / (1 + 5) / inputs)
    assert 0.9 * bound < np.abs(first).max() <= bound
    assert abs(first.mean()) < 0.1 * bound
    assert held["w0.lora_scale"] == 1.0  # alpha is the rank, unless it is given
    other = read_weights(adapt(ZOO["chain"].build(), lora="w0", rank=50, seed=5))
    np.testing.assert_array_equal(other["w0.lora_A"], first)
    third = read_weights(adapt(ZOO["chain"].build(), lora="w0", rank=50, seed=6))
    assert not np.array_equal(third["w0.lora_A"], first)


def test_names_that_the_model_has_already_are_not_taken_twice() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 4, 4), out="w.lora_A")
    net.op("Relu", "w.lora_A", out="y")
    model = net.finish({"x": (FLOAT, ["N", 4])}, "y", 4)
    content = fill(adapt(model, lora="w", rank=2))
    assert "w.lora_A_1" in read_weights(content)
    folded = onnx.ModelProto.FromString(merge(content, fold=True))
    assert [n.output[0] for n in folded.graph.node] == ["w.lora_A", "y"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "--lora REGEX"),
        ({"lora": "w", "adapters": "file"}, "--lora REGEX"),
        ({"adapters": "file", "rank": 4}, "--rank is for new adapters"),
        ({"adapters": "file", "seed": 4}, "--seed is for new adapters"),
        ({"lora": "w", "rank": 0}, "--rank must be at least 1, not 0"),
        ({"lora": "w", "alpha": 0.0}, "--alpha must be above 0 and finite"),
        ({"lora": "w", "seed": -1}, "--seed must be at least 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        adapt(ZOO["chain"].build(), **options)  # type: ignore[arg-type]


def test_a_model_with_adapters_or_of_an_old_opset_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"it has adapters already.*merge --fold"):
        adapt(adapt(ZOO["chain"].build(), lora="w0"), lora="w1")
    net = Net(opset=6)
    net.op("MatMul", "x", net.weight("w", 4, 4), out="y")
    with pytest.raises(UnsupportedModel, match="opset 6, and adapters need 7"):
        adapt(net.finish({"x": (FLOAT, ["N", 4])}, "y", 4), lora="w")


def test_what_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    adapt(ZOO["embedding"].build(), lora="table|w1")
    assert "no adapter for 'table': Gather uses it" in caplog.text


def test_the_file_holds_all_weights_in_one_or_in_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "adapted.onnx"
    onnx.save(
        ZOO["chain"].build(), source, save_as_external_data=True, location="beside.bin",
        size_threshold=0,
    )  # fmt: skip
    adapted = write_adapted(source, target, lora="^w[01]$", rank=2)
    assert adapted.weights == ("w0", "w1")
    assert adapted.parameters == 2 * (6 + 8) + 2 * (8 + 7)
    assert adapted.size == target.stat().st_size
    with pytest.raises(UnwritableFile, match="exists already"):
        write_adapted(source, target, lora="^w0$")
    monkeypatch.setattr(model_files, "MAX_INSIDE", 64)
    large = tmp_path / "large.onnx"
    assert write_adapted(source, large, lora="^w[01]$", rank=2).size > adapted.size
    (tmp_path / "beside.bin").unlink()
    data = ZOO["chain"].data(4)
    np.testing.assert_array_equal(run(onnx.load(target), data), run(onnx.load(large), data))


def test_saved_adapters_are_put_into_the_original_again(tmp_path: Path) -> None:
    original = ZOO["attention"].build()
    adapted = fill(adapt(original, lora="w[qkv]", rank=3, alpha=5))
    write_adapters(adapted, tmp_path / "adapters.safetensors")
    again = adapt(original, adapters=tmp_path / "adapters.safetensors")
    assert describe(again) == describe(adapted)
    assert read_note(open_model(again)) == read_note(open_model(adapted))
    expected = read_weights(adapted)
    assert list(read_weights(again)) == list(expected)
    for name, array in read_weights(again).items():
        np.testing.assert_array_equal(array, expected[name])
    with pytest.raises(UsageError, match=r"--alpha is 4, but .* says 5"):
        adapt(original, adapters=tmp_path / "adapters.safetensors", alpha=4)
    with pytest.raises(UnsupportedModel, match=r"no weight 'wq\.weight' or 'wq'"):
        adapt(ZOO["chain"].build(), adapters=tmp_path / "adapters.safetensors")
