"""An operator lists two clients of a round while one waits for the other, and after it."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest

from splitonnx.bundles import Bundle
from splitonnx.names import SHARE
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.policies.tasks import Delivery, Task
from splitonnx.runtime.server.servers import Server
from tests.commands.conftest import command  # noqa: F401
from tests.support.commands import Command
from tests.support.zoo import ZOO

WAIT = 60.0
ROUNDS = 2


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1")


class Shares:
    """Says when the policy of a running server has taken a share."""

    def __init__(self, server: Server) -> None:
        self.taken = threading.Event()
        policy = server._registry.policy
        submit = policy.submit

        def take(task: Task) -> Generator[Delivery, None, None]:
            yield from submit(task)
            if task.key.phase == SHARE:
                self.taken.set()

        policy.submit = take  # type: ignore[method-assign]


@contextmanager
def training(client: Client) -> Iterator[None]:
    """Train with a client in a thread, which is over at the end of the context."""
    data = ZOO["chain"].data(4)
    fit = threading.Thread(target=lambda: client.fit(data, epochs=ROUNDS + 9, batch_size=4))
    fit.start()
    try:
        yield
    finally:
        fit.join(WAIT)
    assert not fit.is_alive()


def test_a_client_that_waits_for_its_round_is_listed_beside_the_one_it_waits_for(
    bundle: Bundle, request: pytest.FixtureRequest
) -> None:
    run: Command = request.getfixturevalue("command")
    assert bundle.server is not None
    options = PolicyOptions(name="splitfed-v1", clients_min=2, local_steps=1, rounds=ROUNDS)
    with (
        Server(bundle.server, port=0, threads=1, policy=options) as server,
        Client(bundle.client, server.url, threads=1, share=True) as early,
        Client(bundle.client, server.url, threads=1, share=True) as late,
    ):

        def look() -> tuple[dict[str, object], list[dict[str, object]]]:
            found = json.loads(run.succeed("sessions", server.url, "--json"))
            sessions = found.pop("sessions")
            assert [one["session"] for one in sessions] == [
                early.session[:8],
                late.session[:8],
            ]
            return found, sessions

        shares = Shares(server)
        with training(early):
            assert shares.taken.wait(WAIT)
            found, (waits, idle) = look()
            assert found == {"policy": "splitfed-v1", "rounds": 0, "left_out": 0}
            assert (waits["activity"], idle["activity"]) == ("waiting", "idle")
            assert (waits["round"], waits["step"], waits["rounds_behind"]) == (None, 0, 0)
            assert "waiting" in run.succeed("sessions", server.url)
            with training(late):
                pass
        found, sessions = look()
        assert found["rounds"] == ROUNDS
        for one in sessions:
            assert (one["round"], one["rounds_behind"], one["steps_behind"]) == (ROUNDS, 0, 0)
            assert (one["step"], one["version"], one["activity"]) == (ROUNDS, ROUNDS, "idle")
            assert one["seconds_since_left"] is None
        for client, one in zip((early, late), sessions, strict=True):
            sent, received = client._runner._channel.traffic  # type: ignore[union-attr]
            assert (one["bytes_up"], one["bytes_down"]) == (sent, received)
