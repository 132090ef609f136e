"""The losses in numpy that the other tests compare with are those of PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from splitonnx.losses import Loss  # noqa: E402 - after the skip
from tests.partitioner.differentiation.test_loss_formulas import (  # noqa: E402
    CLASSES,
    WEIGHTS,
    draw_data,
    train_once,
)
from tests.support.loss_references import draw_weights, measure, predict  # noqa: E402


def measure_in_torch(loss: Loss, scores: Any, data: dict[str, Any]) -> Any:
    """Return the loss by PyTorch's own function; classes are last."""
    functional = torch.nn.functional
    kinds = {
        "mse": functional.mse_loss,
        "l1": functional.l1_loss,
        "bce-with-logits": functional.binary_cross_entropy_with_logits,
    }
    labels = data["labels"]
    share = torch.ones(labels.shape, dtype=torch.float64)
    if loss.sample_weights is not None:
        share = share * data["trust"].double().reshape(-1, *[1] * (labels.ndim - 1))
    if loss.kind != "cross-entropy":
        terms = kinds[loss.kind](scores, labels.double(), reduction="none")
        return (terms * share).sum() / share.sum()
    settings = {
        "weight": torch.tensor(loss.class_weights or [1.0] * 4, dtype=torch.float64),
        "ignore_index": -100 if loss.ignore_index is None else loss.ignore_index,
        "label_smoothing": loss.label_smoothing,
    }
    moved = scores.movedim(-1, 1)
    if loss.sample_weights is None:
        return functional.cross_entropy(moved, labels, **settings)
    terms = functional.cross_entropy(moved, labels, reduction="none", **settings)
    counted = torch.where(
        labels == settings["ignore_index"], 0.0, settings["weight"][labels * (labels >= 0)]
    )
    return (terms * share).sum() / (counted * share).sum()


@pytest.mark.parametrize("tokens", [False, True], ids=["samples", "tokens"])
@pytest.mark.parametrize(
    "loss",
    [
        *CLASSES,
        Loss(label_smoothing=0.2, class_weights=WEIGHTS),
        Loss(label_smoothing=0.2, ignore_index=1),
        Loss(class_weights=WEIGHTS, ignore_index=-100),
        Loss(label_smoothing=0.2, class_weights=WEIGHTS, ignore_index=0),
        *(Loss(kind=kind) for kind in ("mse", "l1", "bce-with-logits")),
        *(Loss(kind=kind, sample_weights="trust") for kind in ("mse", "l1", "bce-with-logits")),
    ],
    ids=repr,
)
def test_values_and_gradients_are_those_of_torch(loss: Loss, tokens: bool) -> None:
    data = draw_data(loss, tokens=tokens)
    weights = {
        name: torch.tensor(array.astype(np.float64), requires_grad=True)
        for name, array in draw_weights().items()
    }
    arrays = {name: torch.from_numpy(array) for name, array in data.items()}
    scores = torch.tanh(arrays["x"].double() @ weights["w1"]) @ weights["w2"]
    value = measure_in_torch(loss, scores, arrays)
    value.backward()
    wanted = float(value.detach())
    exact = {name: w.detach().numpy() for name, w in weights.items()}
    assert measure(loss, predict(exact, data["x"]), data)[0] == pytest.approx(wanted, rel=1e-12)
    axis = -1 if tokens and loss.kind == "cross-entropy" else None
    own = msgspec.structs.replace(loss, class_axis=axis)
    results, gradients = train_once(own, data, {"at": "hidden"}, tokens=tokens)
    assert results["loss"] == pytest.approx(wanted, abs=1e-6)
    for name, weight in weights.items():
        np.testing.assert_allclose(gradients[name], weight.grad.numpy(), atol=1e-6)


def test_where_torch_has_no_number_a_batch_counts_nothing() -> None:
    loss = Loss(ignore_index=-100)
    data = draw_data(loss)
    data["labels"][:] = -100
    scores = torch.from_numpy(predict(draw_weights(), data["x"]))
    assert torch.isnan(torch.nn.functional.cross_entropy(scores, torch.from_numpy(data["labels"])))
    assert train_once(loss, data, {"at": None})[0]["loss"] == 0


class Focal(torch.nn.Module):  # type: ignore[misc,name-defined]
    """A loss as people write their own."""

    def forward(self, scores: Any, labels: Any) -> Any:
        """Compute the focal loss."""
        term = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
        return ((1 - torch.exp(-term)) ** 2 * term).mean()


@pytest.mark.parametrize("is_dynamo", [False, True], ids=["script", "dynamo"])
@pytest.mark.filterwarnings("ignore")
def test_a_loss_exported_by_torch_trains_as_in_torch(tmp_path: Path, is_dynamo: bool) -> None:
    data = draw_data(Loss())
    example = (torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64))
    names = {"input_names": ["scores", "labels"], "output_names": ["loss"], "dynamo": is_dynamo}
    path = tmp_path / "focal.onnx"
    if is_dynamo:
        batch = torch.export.Dim("batch")
        torch.onnx.export(Focal(), example, path, dynamic_shapes=[{0: batch}, {0: batch}], **names)
    else:
        axes = {"scores": {0: "batch"}, "labels": {0: "batch"}}
        torch.onnx.export(Focal(), example, path, dynamic_axes=axes, **names)
    weights = {name: torch.tensor(a, requires_grad=True) for name, a in draw_weights().items()}
    scores = torch.tanh(torch.from_numpy(data["x"]) @ weights["w1"]) @ weights["w2"]
    value = Focal()(scores, torch.from_numpy(data["labels"]))
    value.backward()
    results, gradients = train_once(Loss(kind=str(path)), data, {"at": "hidden"})
    assert results["loss"] == pytest.approx(float(value.detach()), abs=1e-6)
    for name, weight in weights.items():
        np.testing.assert_allclose(gradients[name], weight.grad.numpy(), atol=1e-6)
