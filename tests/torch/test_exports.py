"""A network is exported for training as it is, or refused with what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")

from splitonnx.errors import UnwritableFile, UsageError, WrongExport  # noqa: E402 - after the skip
from splitonnx.manifests import Role  # noqa: E402
from splitonnx.partitioner.permissions import cut  # noqa: E402
from splitonnx.partitioner.reports.checks import check  # noqa: E402
from splitonnx.partitioner.reports.remarks import Kind  # noqa: E402
from splitonnx.torch import export  # noqa: E402
from splitonnx.torch.networks import read_arrays  # noqa: E402
from tests.support.torch_networks import (  # noqa: E402
    Channelwise,
    Convolutional,
    Counting,
    Masked,
    Recurrent,
    Tied,
)

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.arange(15).reshape(3, 5) % 12
IMAGE = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def list_nodes(content: bytes, operator: str) -> list[onnx.NodeProto]:
    model = onnx.load_model_from_string(content)
    return [node for node in model.graph.node if node.op_type == operator]


def test_an_export_is_whole_and_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    network = Tied().eval()
    before = read_arrays(network)
    made = export(network, TOKENS, tmp_path / "model.onnx", output_names=["scores"])
    assert made.path is not None
    assert made.path.read_bytes() == made.model
    assert (made.inputs, made.outputs, made.exporter) == (("tokens",), ("scores",), "legacy")
    assert "embedding.weight" in made.parameters
    assert made.difference < 1e-5
    assert not network.norm.training
    model = onnx.load_model_from_string(made.model)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, array in read_arrays(network).items():
        np.testing.assert_array_equal(array, before[name])
        if name in stored:
            np.testing.assert_array_equal(stored[name], array)
    found = check(made.model)
    assert found.trainable
    assert {remark.kind for remark in found.remarks} <= {Kind.INITIAL_STATISTICS}


def test_a_batchnorm_that_the_user_froze_stays_frozen() -> None:
    network = Convolutional()
    network.norm.eval()
    (node,) = list_nodes(export(network, IMAGE).model, "BatchNormalization")
    assert not any(a.name == "training_mode" and a.i for a in node.attribute)


def test_buffers_that_would_be_trained_are_told_with_the_option(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = export(Convolutional(), IMAGE[:1])
    assert made.freeze == ("^table$",)
    assert "cut applies --freeze '^table$'" in caplog.text
    caplog.clear()
    bundle = cut(made.model, at=None)
    assert bundle.manifest.recipe.freeze == made.freeze
    assert "'table': not trained, as the model's file says" in caplog.text


def test_constants_that_the_exporter_adds_are_frozen_and_nothing_else_is_trained() -> None:
    network = Convolutional()
    network.norm = torch.nn.GroupNorm(2, 4)
    made = export(network, IMAGE)
    bundle = cut(made.model, at=None)
    trained = {s.tensor.name for s in bundle.client.manifest.state if s.role is Role.PARAMETER}
    assert trained == dict(network.named_parameters()).keys()


def test_bfloat16_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"export model\.float\(\)"):
        export(Convolutional().bfloat16(), IMAGE.bfloat16())


def test_a_cumulative_average_is_refused_since_onnx_has_none() -> None:
    network = Convolutional()
    network.norm.momentum = None
    with pytest.raises(WrongExport, match="give the module a momentum"):
        export(network, IMAGE)


def test_a_parameter_that_gets_no_gradient_is_told_with_the_option() -> None:
    network = Convolutional()
    network.forward = lambda image: (  # type: ignore[method-assign,unused-ignore]
        network.last(network.norm(network.conv(image)).mean((2, 3)) + network.extra.detach())
    )
    network.extra = torch.nn.Parameter(torch.randn(4))
    made = export(network, IMAGE)
    assert made.freeze == ("^extra$",)
    bundle = cut(made.model, at=None, freeze=made.freeze, stop_gradients=made.stop_gradients)
    assert bundle.manifest.recipe.freeze == made.freeze


def test_dropout_in_attention_is_on_and_unused_parameters_are_told() -> None:
    example = {"mask": torch.zeros(3, 6, dtype=torch.bool), "data": torch.randn(3, 6, 8)}
    made = export(Masked(), example)
    assert (made.inputs, made.outputs) == (("data", "mask"), ("scores", "sums"))
    assert made.unused == ("unused.bias", "unused.weight")
    dropouts = list_nodes(made.model, "Dropout")
    assert len(dropouts) == 4  # three modules, and the attention's own
    assert all(len(node.input) == 3 for node in dropouts)


def test_recurrent_dropout_is_kept_beside_batchnorm_in_training_mode() -> None:
    pytest.importorskip("onnxscript")
    made = export(Recurrent(), torch.randn(4, 3, 3))
    assert made.exporter == "dynamo"
    assert len(list_nodes(made.model, "Dropout")) == 1
    (norm,) = list_nodes(made.model, "BatchNormalization")
    assert any(a.name == "training_mode" and a.i == 1 for a in norm.attribute)
    assert {"layers.weight_ih_l0", "layers.bias_hh_l1"} <= set(made.parameters)


def test_a_network_that_depends_on_the_number_of_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongExport, match="'output' in eval mode with 4 samples"):
        export(Counting(), torch.randn(3, 3), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_dropout_of_channels_is_refused_with_what_to_use() -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(WrongExport, match=r"use these in place of Dropout2d and the like"):
        export(Channelwise(), torch.randn(3, 4, 3))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"output_names": ["a", "b"]}, UsageError),
        ({"output_names": ["tokens"]}, UsageError),
        ({"path": "."}, UnwritableFile),
    ],
)
def test_names_and_places_that_do_not_fit_are_refused(options: Any, error: type) -> None:
    with pytest.raises(error):
        export(Tied(), TOKENS, **options)


def test_a_file_that_exists_is_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(UnwritableFile, match="it exists already"):
        export(Tied(), TOKENS, path)
    assert path.read_text() == "mine"
    export(Tied(), TOKENS, path, overwrite=True)
    assert path.read_bytes()[:4] != b"mine"
