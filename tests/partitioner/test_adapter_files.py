"""Files of adapters alone: PEFT's names and shapes, the adapters' size, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from splitonnx.errors import (
    FormatError,
    UnsupportedModel,
    UnusableFile,
    UnwritableFile,
    UsageError,
)
from splitonnx.partitioner.adaptations import adapt
from splitonnx.partitioner.adapter_files import read_adapters
from splitonnx.partitioner.merges import write_adapters
from splitonnx.partitioner.partitions import cut
from tests.support.adapted_models import fill, read_weights, run
from tests.support.nets import FLOAT, Net
from tests.support.zoo import ZOO


def build() -> onnx.ModelProto:
    """Return a network with the names and layout of PyTorch's Linear layers."""
    net = Net()
    net.op("Gemm", "x", net.weight("fc1.weight", 40, 30), net.weight("fc1.bias", 40), out="h",
           transB=1)  # fmt: skip
    net.op("Gemm", "h", net.weight("fc2.weight", 5, 40), net.weight("fc2.bias", 5), out="y",
           transB=1)  # fmt: skip
    return net.finish({"x": (FLOAT, ["N", 30])}, "y", 5)


def test_the_file_has_the_names_and_shapes_of_peft_and_the_size_of_the_adapters(
    tmp_path: Path,
) -> None:
    adapted, path = fill(adapt(build(), lora="fc", rank=4, alpha=16)), tmp_path / "a.safetensors"
    size = write_adapters(adapted, path)
    held = read_weights(adapted)
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt", "lora_alpha": "16.0"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: array.shape for name, array in found.items()} == {
        "base_model.model.fc1.lora_A.weight": (4, 30),
        "base_model.model.fc1.lora_B.weight": (40, 4),
        "base_model.model.fc2.lora_A.weight": (4, 40),
        "base_model.model.fc2.lora_B.weight": (5, 4),
    }
    for name, array in found.items():
        inner = name.removeprefix("base_model.model.").removesuffix(".weight")
        np.testing.assert_array_equal(array, held[inner].T)
    elements = sum(array.size for array in found.values())
    assert size == path.stat().st_size
    assert 4 * elements < size < 4 * elements + 1024


def test_a_file_that_peft_wrote_is_read_with_the_alpha_of_its_configuration(
    tmp_path: Path,
) -> None:
    random, path = np.random.default_rng(2), tmp_path / "adapter_model.safetensors"
    first = random.standard_normal((3, 30)).astype(np.float32)
    second = random.standard_normal((40, 3)).astype(np.float32)
    names = ("base_model.model.fc1.lora_A.weight", "base_model.model.fc1.lora_B.weight")
    save_file(dict(zip(names, (first, second), strict=True)), path, {"format": "pt"})
    with pytest.raises(UsageError, match=r"give it with --alpha.*lora_alpha"):
        adapt(build(), adapters=path)
    x = random.standard_normal((2, 30)).astype(np.float32)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in build().graph.initializer}
    hidden = x @ (held["fc1.weight"] + 6 / 3 * second @ first).T + held["fc1.bias"]
    expected = hidden @ held["fc2.weight"].T + held["fc2.bias"]
    made = adapt(build(), adapters=path, alpha=6)
    np.testing.assert_allclose(run(made, {"x": x}), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_adapters_are_saved_in_their_weight_s_type(dtype: str, tmp_path: Path) -> None:
    net, kind = Net(), onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    net.constant("w.weight", np.eye(4, dtype=dtype))
    net.op("MatMul", "x", "w.weight", out="y")
    graph = onnx.helper.make_graph(
        net.nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, ["N", 4])],
        [onnx.helper.make_tensor_value_info("y", kind, ["N", 4])],
        net.weights,
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    write_adapters(adapt(model, lora="w", rank=2), tmp_path / "a.safetensors")
    first, _ = read_adapters(tmp_path / "a.safetensors").matrices["w"]
    assert first.dtype == dtype


def test_adapters_of_a_bundle_are_its_trained_ones_and_other_changes_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = cut(adapt(build(), lora="fc1", rank=2), at=None, train=["fc2.bias"])
    state = {name: array + np.float32(1) for name, array in bundle.client.state().items()}
    frozen = bundle.client.weights
    state |= {name: frozen[name] for name in ("fc1.weight", "fc1.bias", "fc2.weight")}
    parties = {"client": replace(bundle.client, trained=state, step=1)}
    path = tmp_path / "a.safetensors"
    write_adapters(replace(bundle, parties=parties), path)
    _, second = read_adapters(path).matrices["fc1"]
    np.testing.assert_array_equal(second, np.ones((2, 40)))
    assert "'fc2.bias' changed in training as well" in caplog.text
    caplog.clear()
    with pytest.raises(UnwritableFile, match="exists already"):
        write_adapters(bundle, path)
    write_adapters(bundle, path, overwrite=True)
    assert "changed in training" not in caplog.text
    with pytest.raises(UsageError, match="no adapters to write"):
        write_adapters(build(), tmp_path / "b.safetensors")


ONE = np.ones((2, 30), np.float32)


@pytest.mark.parametrize(
    ("tensors", "metadata", "reason"),
    [
        ({"fc1.weight": ONE}, {}, r"it holds 'fc1\.weight'; adapters are named <module>"),
        ({"fc1.lora_A.weight": ONE}, {}, "of 'fc1' it holds lora_A alone"),
        (
            {"fc1.lora_A.weight": ONE, "fc1.lora_A.default.weight": ONE},
            {},
            "under two names",
        ),
        ({"fc1.lora_A.weight": ONE[0]}, {}, "is not a matrix of floats"),
        (
            {"fc1.lora_A.weight": ONE, "fc1.lora_B.weight": np.ones((40, 3), np.float32)},
            {},
            "lora_A has rank 2 and lora_B 3",
        ),
        (
            {"fc1.lora_A.weight": ONE, "fc1.lora_B.weight": np.ones((40, 2), np.float32)},
            {"lora_alpha": "much"},
            "its lora_alpha is 'much'",
        ),
        ({}, {"format": "pt"}, "it holds no adapters"),
    ],
)
def test_a_file_of_something_else_is_refused(
    tensors: dict[str, np.ndarray], metadata: dict[str, str], reason: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(FormatError, match=reason):
        read_adapters(tmp_path / "a.safetensors")


def test_a_file_that_cannot_be_read_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableFile, match="it cannot be read"):
        read_adapters(tmp_path / "nowhere")
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(FormatError, match="text"):
        read_adapters(tmp_path / "text")
    path = tmp_path / "a.safetensors"
    save_file({"fc2.lora_A.weight": ONE, "fc2.lora_B.weight": np.ones((40, 2), np.float32)}, path)
    with pytest.raises(UnsupportedModel, match=r"for 30 inputs and 40 outputs.*has 40 and 5"):
        adapt(build(), adapters=path, alpha=1)
    save_file({"table.lora_A.weight": ONE, "table.lora_B.weight": ONE.T}, path)
    with pytest.raises(UnsupportedModel, match=r"'table' can have no adapter.*Gather"):
        adapt(ZOO["embedding"].build(), adapters=path, alpha=1)


def test_two_adapters_of_one_name_are_refused(tmp_path: Path) -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("fc", 4, 4), out="h")
    net.op("MatMul", "h", net.weight("fc.weight", 4, 4), out="y")
    model = net.finish({"x": (FLOAT, ["N", 4])}, "y", 4)
    with pytest.raises(UnsupportedModel, match=r"has its name in the file, 'base_model\.model\.fc"):
        write_adapters(adapt(model, lora="fc", rank=2), tmp_path / "a.safetensors")
    names = [f"{module}.lora_{letter}.weight" for module in ("fc", "fc.weight") for letter in "AB"]
    pair = (np.ones((2, 4), np.float32), np.ones((4, 2), np.float32))
    save_file(dict(zip(names, pair * 2, strict=True)), tmp_path / "b.safetensors")
    with pytest.raises(UnsupportedModel, match=r"it holds two adapters of 'fc\.weight'"):
        adapt(model, adapters=tmp_path / "b.safetensors", alpha=1)
