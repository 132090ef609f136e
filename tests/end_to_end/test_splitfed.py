"""Clients of one server train one model: rounds average what each of them learned."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import PartyBundle
from splitonnx.errors import SharingNotPermitted
from splitonnx.names import CLIENT, SERVER
from splitonnx.optimizers import SGD
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import Evaluation
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.servers import Server
from splitonnx.sharing import list_joined
from tests.support.commands import start
from tests.support.joint_trainings import SIZES, average, split, step_alone, train_together
from tests.support.zoo import ZOO

STEPS = 3
RATE = 0.1


@pytest.mark.parametrize(
    ("name", "at", "tail_at"),
    [("chain", "act1", "act3"), ("batchnorm_trained", "r1", "c2"), ("mse", "act0", "act1")],
)
@pytest.mark.parametrize("is_u_shaped", [False, True], ids=["vanilla", "U-shaped"])
def test_one_local_step_is_federated_averaging_of_the_whole_model(
    name: str, at: str, tail_at: str, is_u_shaped: bool
) -> None:
    entry, tails = ZOO[name], (tail_at,) if is_u_shaped else ()
    model, data = entry.build(), split(entry.data(sum(SIZES)))
    sgd = SGD(lr=RATE)
    bundle = cut(model, at=at, tail_at=tails, loss=entry.loss, optimizer=sgd)
    options = PolicyOptions(name="splitfed-v1", clients_min=len(SIZES))
    clients, copies = train_together(bundle, data, options, STEPS)

    unsplit = cut(model, at=None, loss=entry.loss, optimizer=sgd)
    joint = dict(unsplit.client.weights)
    for _ in range(STEPS):
        learned = [step_alone(unsplit, joint, part) for part in data]
        joint = {key: average([state[key] for state in learned]) for key in joint}
    manifests = {CLIENT: bundle.client.manifest, SERVER: bundle.parties[SERVER].manifest}
    compared = 0
    for party, states in ((CLIENT, clients), (SERVER, copies)):
        for key in list_joined(manifests[party]):
            for state in states:
                np.testing.assert_array_equal(state[key], states[0][key])
            np.testing.assert_allclose(states[0][key], joint[key], rtol=0, atol=1e-5, err_msg=key)
            compared += 1
    assert compared >= 4


def test_a_client_whose_user_does_not_permit_it_is_refused_with_how_to() -> None:
    bundle = cut(ZOO["chain"].build(), at="act1")
    assert bundle.server is not None
    options = PolicyOptions(name="splitfed-v1")
    with (
        Server(bundle.server, port=0, threads=1, policy=options) as server,
        pytest.raises(SharingNotPermitted, match="--share"),
    ):
        Client(bundle.client, server.url, threads=1)


class KilledServer:
    """`splitonnx serve` of a folder, in a process that can be killed and started again."""

    def __init__(self, folder: Path, *options: object) -> None:
        self._words = ["serve", folder, "--threads", 1, *options]
        self._port = "0"
        self.start()

    def start(self, *options: object) -> None:
        self._process = start(*self._words, "--port", self._port, *options)
        assert self._process.stderr is not None
        line = next(line for line in self._process.stderr if "serving on ws://" in line)
        self.url = "ws://" + line.split("ws://")[1].split(",")[0].strip()
        self._port = self.url.rsplit(":", 1)[1]

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def test_a_server_that_is_killed_when_a_client_has_left_returns_with_what_was_joined(
    tmp_path: Path,
) -> None:
    entry = ZOO["chain"]
    bundle = cut(entry.build(), at="act1", loss=entry.loss, optimizer=SGD(lr=RATE))
    bundle.save(tmp_path / "bundle")
    ours, others, _ = split(entry.data(sum(SIZES)))
    policy = ("--policy", "splitfed-v1", "--clients-min", 2, "--local-steps", 3)
    server = KilledServer(tmp_path / "bundle" / "server", *policy)

    def train_others() -> None:
        with Client(bundle.client, server.url, threads=1, share=True) as client:
            client.fit(others, batch_size=2)

    thread = threading.Thread(target=train_others)
    thread.start()

    def kill(evaluation: Evaluation) -> None:
        thread.join()
        server.kill()
        server.start("--resume")

    party = PartyBundle.load(tmp_path / "bundle" / CLIENT)
    try:
        with Client(party, server.url, threads=1, share=True) as client:
            history = client.fit(
                ours, batch_size=1, checkpoint_every=1, eval_data=ours, on_epoch=kill
            )
            again = client.evaluate(ours)
    finally:
        server.kill()
    assert len(history.steps) == len(ours["x"])
    assert again == pytest.approx(history.evaluations[0].metrics, rel=1e-6)
