"""The legacy exporter is tried first, and the other one where it refuses."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from splitonnx.errors import NotExported, TorchNeeded  # noqa: E402 - after the skip
from splitonnx.torch import calls  # noqa: E402
from splitonnx.torch.calls import call_exporter  # noqa: E402
from splitonnx.torch.examples import read_example  # noqa: E402
from tests.support.torch_networks import Tied  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def refuse(*_: object, **__: object) -> None:
    raise RuntimeError("no such operator\nand more")


def test_names_dynamic_batch_and_training_mode_are_kept() -> None:
    network = Tied()
    example = read_example(torch, network, torch.randint(0, 12, (4, 5)))
    called = call_exporter(torch, network, example, ["scores"], ["scores"], recurrent_dropout=False)
    model = called.model
    assert (called.exporter, called.detached) == ("legacy", ())
    batches = [v.type.tensor_type.shape.dim[0].dim_param for v in (model.graph.input[0],)]
    assert batches == ["N"]
    assert [value.name for value in model.graph.output] == ["scores"]
    assert "embedding.weight" in {tensor.name for tensor in model.graph.initializer}
    (norm,) = (node for node in model.graph.node if node.op_type == "BatchNormalization")
    assert any(a.name == "training_mode" and a.i == 1 for a in norm.attribute)


def test_both_reasons_are_told_where_neither_exporter_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.onnx, "export", refuse)
    network = Tied()
    example = read_example(torch, network, torch.randint(0, 12, (4, 5)))
    monkeypatch.setattr(calls, "has_onnxscript", lambda: True)
    with pytest.raises(NotExported) as caught:
        call_exporter(torch, network, example, ["y"], [], recurrent_dropout=False)
    assert caught.value.reasons == dict.fromkeys(("legacy", "dynamo"), "no such operator")


def test_a_missing_onnxscript_is_named_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "has_onnxscript", lambda: False)
    network = Tied()
    example = read_example(torch, network, torch.randint(0, 12, (4, 5)))
    with pytest.raises(TorchNeeded, match="pip install 'onnxscript'"):
        call_exporter(torch, network, example, ["y"], [], recurrent_dropout=True)
