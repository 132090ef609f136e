"""With one client, each policy that joins what clients learn trains as the policy that does not."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import UsageError
from splitonnx.names import (
    ASYNCHRONOUS,
    PER_CLIENT,
    SEQUENTIAL,
    SPLITFED_V1,
    SPLITFED_V2,
    SYNCHRONOUS,
)
from splitonnx.optimizers import AdamW
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import list_cuts
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.servers import Server
from tests.support.zoo import ZOO

EPOCHS, SAMPLES, BATCH = 2, 12, 4


def train(
    bundle: Bundle,
    data: Mapping[str, np.ndarray],
    policy: str,
    *,
    accumulate: int = 1,
    isolate: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Train one client; return its state and the server's."""
    assert bundle.server is not None
    options = PolicyOptions(name=policy, round_timeout=30.0)
    with (
        Server(bundle.server, port=0, threads=1, policy=options, isolate=isolate) as server,
        Client(bundle.client, server.url, threads=1, share=True) as client,
    ):
        client.fit(data, epochs=EPOCHS, batch_size=BATCH, accumulate=accumulate)
        client.evaluate(data)  # it is answered after the server's last update
        models = server._registry.policy.models  # type: ignore[attr-defined]
        return client.state(), models[client.session].executor.state()


@pytest.mark.parametrize("name", list(ZOO))
def test_a_client_that_is_alone_trains_the_same_bits_with_every_policy(name: str) -> None:
    entry = ZOO[name]
    model, data = entry.build(), entry.data(SAMPLES)
    tensors = [found.tensor for found in list_cuts(prepare(open_model(model)), None)]
    dims = {"T": data["x"].shape[1]} if name == "shape_paths" else {}
    bundle = cut(
        model, at=tensors[len(tensors) // 2], loss=entry.loss, optimizer=AdamW(lr=0.01), dims=dims
    )
    plain = train(bundle, data, PER_CLIENT)
    for policy in (SEQUENTIAL, SPLITFED_V1, SPLITFED_V2, SYNCHRONOUS):
        for expected, state in zip(plain, train(bundle, data, policy), strict=True):
            assert state.keys() == expected.keys()
            for key, array in expected.items():
                np.testing.assert_array_equal(state[key], array, err_msg=f"{policy}: {key}")


@pytest.mark.parametrize("name", ["batchnorm_trained", "bce"])
def test_steps_of_micro_batches_are_the_same_in_a_worker_and_with_other_policies(
    name: str,
) -> None:
    entry = ZOO[name]
    tensors = [found.tensor for found in list_cuts(prepare(open_model(entry.build())), None)]
    optimizer = AdamW(lr=0.01, clip_norm=1.0)
    bundle = cut(entry.build(), at=tensors[1], loss=entry.loss, optimizer=optimizer)
    data = entry.data(SAMPLES)
    plain = train(bundle, data, PER_CLIENT, accumulate=3)
    others = [
        train(bundle, data, SEQUENTIAL, accumulate=3),
        train(bundle, data, SPLITFED_V1, accumulate=3),
        train(bundle, data, SPLITFED_V2, accumulate=3),
        train(bundle, data, PER_CLIENT, accumulate=3, isolate=True),
        train(bundle, data, SPLITFED_V2, accumulate=3, isolate=True),
    ]
    for states in others:
        for expected, state in zip(plain, states, strict=True):
            for key, array in expected.items():
                np.testing.assert_array_equal(state[key], array, err_msg=key)


@pytest.mark.parametrize("name", ["batchnorm_trained", "bce", "chain"])
def test_a_joint_step_of_one_client_is_its_step_of_micro_batches(name: str) -> None:
    entry = ZOO[name]
    tensors = [found.tensor for found in list_cuts(prepare(open_model(entry.build())), None)]
    optimizer = AdamW(lr=0.01)
    bundle = cut(entry.build(), at=tensors[1], loss=entry.loss, optimizer=optimizer)
    data = entry.data(SAMPLES)
    plain = train(bundle, data, PER_CLIENT, accumulate=3)
    for isolate in (False, True):
        joint = train(bundle, data, SYNCHRONOUS, accumulate=3, isolate=isolate)
        for expected, state in zip(plain, joint, strict=True):
            for key, array in expected.items():
                np.testing.assert_array_equal(state[key], array, err_msg=key)


def test_joint_steps_refuse_micro_batches_where_the_server_trains_nothing() -> None:
    bundle = cut(ZOO["chain"].build(), at="act1", freeze=("^(w|b)[234]$",))
    with pytest.raises(UsageError, match="policy 'synchronous' does not let a step consist of"):
        train(bundle, ZOO["chain"].data(SAMPLES), SYNCHRONOUS, accumulate=2)


@pytest.mark.parametrize("isolate", [False, True], ids=["in the server", "isolated"])
@pytest.mark.parametrize("policy", [SPLITFED_V2, ASYNCHRONOUS])
def test_several_clients_take_steps_of_micro_batches_on_one_model(
    policy: str, isolate: bool
) -> None:
    bundle = cut(ZOO["chain"].build(), at="act0", tail_at="act2", optimizer=AdamW(lr=0.01))
    assert bundle.server is not None
    options = PolicyOptions(name=policy, clients_min=3, quorum=3, local_steps=3, staleness=9)
    with (
        Server(bundle.server, port=0, threads=1, policy=options, isolate=isolate) as server,
        ThreadPoolExecutor(3) as threads,
    ):

        def work(seed: int) -> int:
            data = ZOO["chain"].data(SAMPLES, seed=seed)
            with Client(bundle.client, server.url, threads=1, share=True) as client:
                history = client.fit(data, epochs=EPOCHS, batch_size=BATCH, accumulate=2)
                client.evaluate(data)  # it is answered after the server's last update
                return len(history.steps)

        counts = list(threads.map(work, range(3)))
        model = server._registry.policy._model  # type: ignore[attr-defined]
        assert counts == [EPOCHS * SAMPLES // BATCH] * 3
        assert model.version == sum(counts)  # each step is one update
