"""The process that holds the one model of all clients ends: they go back, and lose no bit."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import StepRecord
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.servers import Server
from tests.support.zoo import ZOO

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kill -9 is a signal of POSIX")

STEPS = 4


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


def end_worker(server: Server) -> None:
    """Kill the process that holds the model, and wait until it has ended."""
    policy = server._registry.policy
    (model,) = {id(model): model for model in policy.models.values()}.values()  # type: ignore[attr-defined]
    worker = model.executor._worker
    os.kill(worker.pid, signal.SIGKILL)
    worker._process.wait()


def train(
    bundle: Bundle, folder: Path, policy: str, *, kills: bool
) -> tuple[list[dict[str, np.ndarray]], list[int]]:
    """Train two clients, one of which ends the worker after its second step."""
    bundle.save(folder)
    options = PolicyOptions(name=policy, clients_min=2, quorum=2, rounds=STEPS, round_timeout=60.0)
    states: dict[int, dict[str, np.ndarray]] = {}
    steps: dict[int, int] = {}
    left = [1] if kills else []

    def run(server: Server, number: int) -> None:
        own = shutil.copytree(folder / "client", folder / f"client-{number}")
        data = {name: array[number * 8 :] for name, array in ZOO["chain"].data(16 + 8).items()}

        def on_step(record: StepRecord) -> None:
            if number == 0 and record.step == 2 and left:
                left.pop()
                end_worker(server)

        with Client(own, server.url, threads=1, share=True) as client:
            client.fit(
                data, epochs=STEPS, batch_size=8, shuffle=False, on_step=on_step, checkpoint_every=1
            )
            states[number], steps[number] = client.state(), client.steps

    with Server(folder / "server", port=0, threads=1, policy=options, isolate=True) as server:
        threads = [threading.Thread(target=run, args=(server, number)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert left == []
    return [states[n] for n in range(2)], [steps[n] for n in range(2)]


@pytest.mark.parametrize("policy", ["splitfed-v2", "synchronous", "asynchronous"])
def test_all_clients_finish_although_the_process_of_their_model_ends(
    bundle: Bundle, tmp_path: Path, policy: str
) -> None:
    states, steps = train(bundle, tmp_path / "rough", policy, kills=True)
    for state in states:
        assert all(np.isfinite(array).all() for array in state.values())
    if policy != "asynchronous":  # whose rounds are shares
        assert steps == [STEPS, STEPS]
    if policy == "synchronous":
        calm, _ = train(bundle, tmp_path / "calm", policy, kills=False)
        for one, other in zip(states, calm, strict=True):
            assert {n: a.tobytes() for n, a in one.items()} == {
                n: a.tobytes() for n, a in other.items()
            }
