"""Labels that do not count, as padded texts have them."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.losses import Loss
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.loss_references import measure
from tests.support.small_models import evaluate, load_data, load_model

NAME = "23_ignore"
LOSS = Loss(ignore_index=-100)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("at", "tail_at"), [("a", ()), ("a", "b")])
def test_padding_counts_in_no_loss_metric_or_evaluation(
    at: str, tail_at: str, target: Target
) -> None:
    data = load_data(NAME)
    data["labels"][:8] = -100  # the first batch is all padding
    bundle = cut(
        load_model(NAME),
        at=at,
        tail_at=tail_at,
        loss=LOSS,
        client_target=target,
        server_target=target,
    )
    assert verify(bundle, data, batch_size=8).ok
    with Client(cut(load_model(NAME), at=None, loss=LOSS).client, threads=1) as client:
        found = client.evaluate(data, batch_size=8)
    scores = np.moveaxis(evaluate(load_model(NAME), data)["y"], 1, -1).astype(np.float64)
    assert found["loss"] == pytest.approx(measure(LOSS, scores, data)[0], abs=1e-6)
    counts = data["labels"] != -100
    right = scores.argmax(-1) == data["labels"]
    assert found["accuracy"] == pytest.approx(right[counts].mean(), abs=1e-6)
