"""With the policy ``synchronous``, several clients train as one that has all their rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from splitonnx.errors import UsageError
from splitonnx.names import CLIENT, SERVER, SYNCHRONOUS
from splitonnx.optimizers import SGD, AdamW, Optimizer
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import list_cuts as list_tensors
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.servers import Server
from splitonnx.sharing import list_joined
from tests.support.joint_trainings import SIZES, split, train_together
from tests.support.zoo import ZOO

STEPS = 3
MOMENTUM = SGD(lr=0.1, momentum=0.9, weight_decay=0.01)


def train_whole(
    model: object, loss: object, data: Mapping[str, np.ndarray], optimizer: Optimizer
) -> dict[str, np.ndarray]:
    """Train the unsplit model with all rows in one batch; return its state."""
    unsplit = cut(model, at=None, loss=loss, optimizer=optimizer)  # type: ignore[arg-type]
    with Client(unsplit.client, threads=1) as client:
        for _ in range(STEPS):
            client.step(data)
        return client.state()


def list_trials() -> list[tuple[str, str, tuple[str, ...]]]:
    """List a vanilla and a U-shaped cut of each network of the zoo.

    Dropout draws its masks by the order of the rows, and a BatchNormalization of the client has the
    statistics of the client's batch alone; both are left out.
    """
    trials: list[tuple[str, str, tuple[str, ...]]] = []
    for name, entry in ZOO.items():
        if name == "dropout":
            continue
        cuts = list_tensors(prepare(open_model(entry.build())), None)
        tensors = [found.tensor for found in cuts]
        if name == "batchnorm_trained":
            trials.append((name, tensors[0], ()))
        else:
            trials.append((name, tensors[len(tensors) // 2], ()))
            trials.append((name, tensors[0], (tensors[-1],)))
    return trials


@pytest.mark.parametrize(
    "counts", [(), (2, 3, 4), (3, 5, 2)], ids=["whole", "2, 3 and 4", "3, 5 and 2"]
)
@pytest.mark.parametrize(("name", "at", "tails"), list_trials())
def test_a_joint_step_is_a_step_of_the_unsplit_model_on_the_joined_batch(
    name: str, at: str, tails: tuple[str, ...], counts: tuple[int, ...]
) -> None:
    """Whether each client sends its batch whole or as micro-batches, in numbers of its own."""
    entry = ZOO[name]
    model, data = entry.build(), entry.data(sum(SIZES))
    dims = {"T": data["x"].shape[1]} if name == "shape_paths" else {}
    bundle = cut(model, at=at, tail_at=tails, loss=entry.loss, optimizer=MOMENTUM, dims=dims)
    assert bundle.server is not None
    if counts and name == "batchnorm_trained":
        pytest.skip("its normalization has the statistics of a micro-batch, whoever trains it")
    if counts and not bundle.server.manifest.accumulators:
        pytest.skip("its server trains nothing, and so takes no micro-batches")
    options = PolicyOptions(name=SYNCHRONOUS, clients_min=len(SIZES), round_timeout=20.0)
    clients, servers = train_together(bundle, split(data), options, STEPS, accumulate=counts)
    whole = train_whole(model, entry.loss, data, MOMENTUM)
    compared = 0
    for party, states in ((CLIENT, clients), (SERVER, servers)):
        for key in list_joined(bundle.parties[party].manifest):
            for state in states:
                np.testing.assert_allclose(state[key], whole[key], rtol=0, atol=1e-5, err_msg=key)
            compared += 1
    assert compared >= 2


def test_the_servers_adam_makes_one_step_of_the_joined_batch() -> None:
    entry, adam, frozen = ZOO["chain"], AdamW(lr=0.01), ("^(w|b)[01]$",)
    model, data = entry.build(), entry.data(sum(SIZES))
    bundle = cut(model, at="act1", loss=entry.loss, optimizer=adam, freeze=frozen)
    options = PolicyOptions(name=SYNCHRONOUS, clients_min=len(SIZES), round_timeout=20.0)
    _, servers = train_together(bundle, split(data), options, STEPS)
    whole = cut(model, at=None, loss=entry.loss, optimizer=adam, freeze=frozen)
    with Client(whole.client, threads=1) as client:
        for _ in range(STEPS):
            client.step(data)
        for key in list_joined(bundle.parties[SERVER].manifest):
            np.testing.assert_allclose(servers[0][key], client.state()[key], rtol=0, atol=1e-5)


def test_tensors_that_cannot_be_joined_are_refused_with_what_to_do() -> None:
    bundle = cut(ZOO["shape_paths"].build(), at="sum")
    assert bundle.server is not None
    with pytest.raises(UsageError, match=r"'sum@server'.* of shape .N, T . 1, 8. cannot be joined"):
        Server(bundle.server, port=0, policy=PolicyOptions(name=SYNCHRONOUS))
