"""Sessions whose stages run in workers: the same numbers, and a crash stays where it is."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import ProcessFailed, RemoteFault, ServerBusy
from splitonnx.messages import TaskKey
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import StepRecord
from splitonnx.runtime.edge.tokens import Tokens, add_token
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.scheduling import places
from splitonnx.runtime.server.servers import Server
from splitonnx.runtime.workers import processes
from splitonnx.runtime.workers.messages import Action, Work, write_frame
from splitonnx.runtime.workers.pools import WorkerPool
from splitonnx.runtime.workers.processes import Worker, WorkerOptions
from splitonnx.runtime.workers.remote_executors import RemoteExecutor
from tests.end_to_end.test_stopping import LARGE, count_bytes_up, serve
from tests.support import tiny
from tests.support.endless import endless_bundle, stuck_bundle
from tests.support.zoo import ZOO

DATA = ZOO["chain"].data(48)
OWNERS = ("ana", "ben")

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> dict[str, np.ndarray]:
    """What training comes to in the server's own process."""
    assert bundle.server is not None
    with (
        Server(bundle.server, port=0, isolate=False) as server,
        Client(bundle.client, server.url) as client,
    ):
        client.fit(DATA, batch_size=8)
        return client.state()


def test_on_loopback_without_tokens_stages_run_in_the_server_unless_it_is_told_otherwise() -> None:
    bundle = tiny.split_bundle()
    assert bundle.server is not None
    for chosen, isolates in ((None, False), (False, False), (True, True)):
        with Server(bundle.server, port=0, isolate=chosen) as server:
            assert (server._workers is not None) is isolates


@dataclass(kw_only=True)
class Clinic:
    """A server with two owners' tokens."""

    server: Server
    tokens: dict[str, str] = field(repr=False)

    def credentials(self, owner: str) -> Credentials:
        return Credentials(token=self.tokens[owner])

    def worker(self, owner: str) -> Worker:
        """Find an owner's worker."""
        pool = self.server._workers
        assert pool is not None
        return pool._leases[f"owner {owner}"].get_worker()

    def end_worker(self, owner: str, step: int, number: int) -> None:
        """End an owner's worker once it has made a step; the client knows the loss before that."""
        (session,) = (s for s in self.server._registry.sessions if s.owner == owner)
        while session.ledger.step < step:
            time.sleep(0.001)
        worker = self.worker(owner)
        os.kill(worker.pid, number)
        worker._process.wait()

    def count_deaths(self) -> float:
        request = urllib.request.Request(
            self.server.url.replace("ws", "http", 1) + "/metrics",
            headers={"Authorization": f"Bearer {self.tokens['ana']}"},
        )
        with urllib.request.urlopen(request) as response:
            lines = response.read().decode().splitlines()
        (line,) = (row for row in lines if row.startswith("splitonnx_worker_deaths_total "))
        return float(line.split()[1])


@contextmanager
def open_clinic(served: object, folder: Path, limits: Limits | None = None) -> Iterator[Clinic]:
    tokens = {owner: add_token(folder / "tokens", owner) for owner in OWNERS}
    known = Tokens.read(folder / "tokens")
    with Server(served, port=0, tokens=known, limits=limits) as server:  # type: ignore[arg-type]
        yield Clinic(server=server, tokens=tokens)


def check_equal(state: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name], array)


@pytest.mark.parametrize("in_folder", [True, False])
def test_training_in_a_worker_is_training_in_the_server(
    bundle: Bundle, expected: dict[str, np.ndarray], in_folder: bool, tmp_path: Path
) -> None:
    assert bundle.server is not None
    bundle.server.save(tmp_path / "server")
    served = tmp_path / "server" if in_folder else bundle.server
    with (
        Server(served, port=0, isolate=True) as server,
        Client(bundle.client, server.url) as client,
    ):
        client.fit(DATA, batch_size=8)
        check_equal(client.state(), expected)


def test_who_is_isolated_by_default(bundle: Bundle, tmp_path: Path) -> None:
    add_token(tmp_path / "tokens", "ana")
    tokens = Tokens.read(tmp_path / "tokens")
    served = bundle.server
    assert served is not None
    assert Server(served)._workers is None
    assert Server(served, tokens=tokens)._workers is not None
    assert Server(served, host="0.0.0.0", insecure=True)._workers is not None
    assert Server(served, tokens=tokens, isolate=False)._workers is None


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
@pytest.mark.parametrize("checkpoint_every", [2, None])
def test_the_death_of_an_owners_worker_is_felt_by_no_other_and_lost_steps_are_made_again(
    bundle: Bundle,
    expected: dict[str, np.ndarray],
    tmp_path: Path,
    number: int,
    checkpoint_every: int | None,
) -> None:
    """On earlier versions every session is in the server's process, and ends with it."""
    bundle.save(tmp_path / "bundle")
    ended: dict[str, dict[str, np.ndarray]] = {}
    seen: dict[str, list[int]] = {owner: [] for owner in OWNERS}

    def train(clinic: Clinic, owner: str, part: object) -> None:
        def on_step(record: StepRecord) -> None:
            seen[owner].append(record.step)
            if owner == "ana" and len(seen["ana"]) == 3:
                clinic.end_worker("ana", 3, number)

        with Client(part, clinic.server.url, credentials=clinic.credentials(owner)) as client:  # type: ignore[arg-type]
            client.fit(
                DATA,
                batch_size=8,
                on_step=on_step,
                checkpoint_every=checkpoint_every if owner == "ana" else None,
            )
            ended[owner] = client.state()

    with open_clinic(tmp_path / "bundle" / "server", tmp_path) as clinic:
        other = threading.Thread(target=train, args=(clinic, "ben", bundle.client))
        other.start()
        train(clinic, "ana", tmp_path / "bundle" / "client")
        other.join()
        assert clinic.count_deaths() == 1
    assert seen["ben"] == [1, 2, 3, 4, 5, 6]
    again = [] if checkpoint_every else [1, 2, 3]  # or the link sends step 3 again by itself
    assert seen["ana"] == [*again, 1, 2, 3, 4, 5, 6]
    for owner in OWNERS:
        check_equal(ended[owner], expected)


@contextmanager
def ending_workers_over(step: int) -> Iterator[None]:
    """Let every worker that is told to work on a step end before it is at it."""
    exchange = Worker._exchange

    def exchange_and_end(worker: Worker, action: Action, tensors: Any) -> Any:
        if not isinstance(action, Work) or action.key.step != step:
            return exchange(worker, action, tensors)
        os.kill(worker.pid, signal.SIGSTOP)  # it reads nothing until it ends

        def write_and_end(pipe: Any, message: Any) -> None:
            write_frame(pipe, message)
            os.kill(worker.pid, signal.SIGKILL)

        with patch("splitonnx.runtime.workers.processes.write_frame", write_and_end):
            return exchange(worker, action, tensors)

    with patch.object(Worker, "_exchange", exchange_and_end):
        yield


def test_a_step_that_ends_its_worker_twice_is_not_tried_a_third_time(
    bundle: Bundle, tmp_path: Path
) -> None:
    with open_clinic(bundle.server, tmp_path) as clinic:
        with (
            Client(
                bundle.client, clinic.server.url, credentials=clinic.credentials("ana")
            ) as client,
            pytest.raises(RemoteFault, match=r"WorkerLost: .* again at the same step .*SIGKILL"),
            ending_workers_over(step=2),
        ):
            client.fit(DATA, batch_size=8)
        with Client(
            bundle.client, clinic.server.url, credentials=clinic.credentials("ana")
        ) as client:
            client.step({name: array[:8] for name, array in DATA.items()})
        assert clinic.count_deaths() == 2


def test_a_worker_that_ends_between_two_steps_is_held_against_neither(
    bundle: Bundle, tmp_path: Path, expected: dict[str, np.ndarray]
) -> None:
    with open_clinic(bundle.server, tmp_path) as clinic:
        kills = 3

        def on_step(record: StepRecord) -> None:
            nonlocal kills
            if record.step == 2 and kills:
                kills -= 1
                clinic.end_worker("ana", 2, signal.SIGKILL)

        with Client(
            bundle.client, clinic.server.url, credentials=clinic.credentials("ana")
        ) as client:
            client.fit(DATA, batch_size=8, on_step=on_step)
            check_equal(client.state(), expected)
        assert clinic.count_deaths() == 3


def test_a_stage_beyond_its_limit_leaves_the_session_and_the_worker_as_they_were() -> None:
    made = endless_bundle()
    assert made.server is not None
    limits = Limits(stage_seconds=0.1)
    with Server(made.server, port=0, isolate=True, limits=limits) as server:
        for _ in range(2):
            with (
                Client(made.client, server.url) as client,
                pytest.raises(RemoteFault, match=r"StageTooSlow: stage 'body.step' was ended"),
            ):
                client.step(tiny.batch(0))
        with Client(made.client, server.url) as client:
            x = tiny.batch(0)["x"]
            (predicted,) = client.predict({"x": x}).values()
    np.testing.assert_allclose(
        predicted, tiny.reference_predict(tiny.reference_state(), x), rtol=1e-5
    )


def test_an_operator_that_cannot_be_ended_ends_its_worker_alone() -> None:
    """On earlier versions it runs on for as long as it takes, in the server."""
    made = stuck_bundle()
    assert made.server is not None
    limits = Limits(stage_seconds=0.1)
    with Server(made.server, port=0, isolate=True, limits=limits, threads=1) as server:
        with (
            Client(made.client, server.url) as client,
            pytest.raises(RemoteFault, match=r"StageTooSlow: stage 'body.step' was ended"),
        ):
            client.step(tiny.batch(0))
        with Client(made.client, server.url) as client:
            client.predict({"x": tiny.batch(0)["x"]})


def test_owners_share_a_worker_in_turns_and_none_is_lost(
    bundle: Bundle, expected: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On earlier versions who comes second is refused as long as the first is there."""
    monkeypatch.setattr(places, "TENURE_SECONDS", 0.0)
    batches = [{n: array[i : i + 8] for n, array in DATA.items()} for i in range(0, 48, 8)]
    with open_clinic(bundle.server, tmp_path, Limits(workers=1)) as clinic, ExitStack() as stack:
        clients = [
            stack.enter_context(
                Client(bundle.client, clinic.server.url, credentials=clinic.credentials(owner))
            )
            for owner in OWNERS
        ]
        pids = []
        for batch in batches:
            for owner, client in zip(OWNERS, clients, strict=True):
                client.step(batch)
                pids.append(clinic.worker(owner).pid)
        states = [client.state() for client in clients]
        assert clinic.count_deaths() == 0
    assert len(set(pids)) == len(pids)
    for name, array in states[0].items():
        np.testing.assert_array_equal(states[1][name], array)


def test_more_clients_than_workers_train_at_once_and_come_to_the_same(
    bundle: Bundle, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "TENURE_SECONDS", 0.0)
    ended: list[dict[str, np.ndarray]] = []

    def train(url: str) -> None:
        with Client(bundle.client, url) as client:
            client.fit(DATA, batch_size=8)
            ended.append(client.state())

    assert bundle.server is not None
    limits = Limits(workers=2)
    with Server(bundle.server, port=0, isolate=True, limits=limits, threads=1) as server:
        threads = [threading.Thread(target=train, args=(server.url,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(ended) == len(threads)
    for state in ended:
        check_equal(state, expected)


@needs_linux
def test_a_worker_that_cannot_start_leaves_no_file_open(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On earlier versions it leaves two, each time a client comes again."""
    assert bundle.server is not None
    options = make_options(bundle.server)
    monkeypatch.setattr(sys, "executable", "/absent/python")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ProcessFailed, match="absent"):
        Worker(options, lambda: 0)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_worker_for_which_no_file_is_left_cannot_start(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    assert bundle.server is not None
    monkeypatch.setattr(processes, "make_block", fail)
    with pytest.raises(ProcessFailed, match="Too many open files"):
        Worker(make_options(bundle.server), lambda: 0)


def test_greetings_take_no_worker(bundle: Bundle) -> None:
    """On earlier versions sixteen of them take them all."""
    limits = Limits(workers=1)
    with (
        Server(bundle.server, port=0, isolate=True, limits=limits) as server,  # type: ignore[arg-type]
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(Client(bundle.client, server.url)) for _ in range(4)]
        clients[-1].step({name: array[:8] for name, array in DATA.items()})


def test_an_open_task_keeps_its_worker(bundle: Bundle) -> None:
    assert bundle.server is not None
    pool = WorkerPool(make_options(bundle.server), workers=1)
    try:
        first, second = (pool.open("", name * 32, None, 0) for name in "ab")
        key = TaskKey("a" * 32, "train", 0, 0)
        begin(first, key)
        with pytest.raises(ServerBusy, match="1 workers"):
            begin(second, TaskKey("b" * 32, "train", 0, 0))
        first.abandon(key)
        second.abandon(TaskKey("b" * 32, "train", 0, 0))
        begin(second, TaskKey("b" * 32, "train", 0, 0))
        assert not first.is_lost
    finally:
        pool.close()


def begin(executor: RemoteExecutor, key: TaskKey) -> None:
    executor.begin(key, data={}, seed=0, learning_rate=0.1)
    executor.deliver(key, {"act1@server": np.ones((2, 7), np.float32)})
    assert [*executor.advance(key)]


def make_options(party: PartyBundle) -> WorkerOptions:
    return WorkerOptions(
        party=party, threads=1, stage_seconds=60.0, memory_bytes=None, kept_bytes=0
    )


def test_a_worker_that_cannot_start_is_told_in_the_log_and_the_step_is_tried_twice(
    bundle: Bundle,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On earlier versions the client is told to look into a module of the server's."""
    with open_clinic(bundle.server, tmp_path) as clinic:
        monkeypatch.setattr(sys, "executable", "false")
        with (
            Client(
                bundle.client, clinic.server.url, credentials=clinic.credentials("ana")
            ) as client,
            pytest.raises(RemoteFault, match=r"WorkerLost: no worker can be started .*--resume"),
        ):
            client.step({name: array[:8] for name, array in DATA.items()})
        assert clinic.count_deaths() == 2
    reasons = [r.message for r in caplog.records if "can be started: " in r.message]
    assert len(reasons) == 2
    assert "it ended with exit code 1" in reasons[0]


@needs_linux
def test_a_worker_has_no_secret_no_socket_and_leaves_no_core(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITONNX_TOKEN", "a secret")
    with open_clinic(bundle.server, tmp_path) as clinic:
        with Client(
            bundle.client, clinic.server.url, credentials=clinic.credentials("ana")
        ) as client:
            client.step({name: array[:8] for name, array in DATA.items()})
        process = Path("/proc", str(clinic.worker("ana").pid))
        assert b"secret" not in (process / "environ").read_bytes()
        opened = _find_files(process)
        assert not [name for name in opened if "tokens" in name]
        here = {name for name in _find_files(Path("/proc/self")) if name.startswith("socket:")}
        assert here  # the server is in this process
        assert not here & opened
        core, data = _find_limits((process / "limits").read_text())
        assert core == "0"
        assert data != "unlimited"


def _find_files(process: Path) -> set[str]:
    found = set()
    for path in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # it was that of the folder itself
            found.add(os.readlink(path))
    return found


def _find_limits(text: str) -> tuple[str, str]:
    lines = {line[:25].strip(): line[25:].split()[0] for line in text.splitlines()}
    return lines["Max core file size"], lines["Max data size"]


@needs_linux
def test_a_worker_ends_with_its_server_even_within_a_stage(tmp_path: Path) -> None:
    made = endless_bundle()
    made.save(tmp_path / "bundle")

    def train(url: str) -> None:
        with pytest.raises(Exception), Client(made.client, url, give_up_after=0) as client:  # noqa: B017, PT011
            client.step(LARGE)

    with serve(tmp_path / "bundle" / "server", "--isolate") as (process, url):
        thread = threading.Thread(target=train, args=(url,))
        thread.start()
        while not (children := _find_children(process.pid)):
            time.sleep(0.01)
        process.kill()
        process.wait()
        thread.join()
    while any(_is_running(child) for child in children):
        time.sleep(0.01)


def _find_children(pid: int) -> list[int]:
    text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(word) for word in text.split()]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform == "win32", reason="signals of its own")
def test_a_second_signal_ends_a_step_in_a_worker(tmp_path: Path) -> None:
    made = endless_bundle()
    made.save(tmp_path / "bundle")

    def train(url: str) -> None:
        with pytest.raises(Exception), Client(made.client, url, give_up_after=0) as client:  # noqa: B017, PT011
            client.step(LARGE)

    with serve(tmp_path / "bundle" / "server", "--isolate") as (process, url):
        assert process.stderr is not None
        thread = threading.Thread(target=train, args=(url,))
        thread.start()
        while count_bytes_up(url) < LARGE["x"].nbytes:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        while "stopping: " not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
        thread.join()
    assert "stopped" in rest.splitlines()[-1]
