"""Early stopping ends at the state of the best evaluation, on both sides, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import NotSaved, UsageError
from splitonnx.optimizers import SGD
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.channels.channels import Channel
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import History, StepRecord
from splitonnx.runtime.client.runners import TaskRunner
from splitonnx.runtime.client.training_runs import TrainingRun
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.runtime.server.servers import Server
from splitonnx.stopping import EarlyStopping
from tests.support.zoo import ZOO

DATA = ZOO["dropout"].data(24)
PER_EPOCH, WAITS = 3, 2
STOPPING = EarlyStopping(metric="loss", patience=WAITS)


def find_rate(step: int) -> float:
    """A rate that trains at first, and then undoes it."""
    return 0.1 if step < 2 * PER_EPOCH else 30.0


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["dropout"].build(), at="d1", tail_at="pool", optimizer=SGD())


@pytest.fixture
def folder(bundle: Bundle, tmp_path: Path) -> Path:
    bundle.save(tmp_path / "bundle")
    return tmp_path / "bundle"


def serve(folder: Path, *, resume: bool = False, port: int = 0) -> Server:
    return Server(folder / "server", port=port, threads=1, resume=resume)


def train(client: Client, *, epochs: int = 9, **options: object) -> History:
    return client.fit(
        DATA, epochs=epochs, batch_size=8, eval_data=DATA, learning_rate=find_rate, save=True,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture(scope="module")
def best(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, np.ndarray]:
    """The state after two epochs of training without early stopping."""
    folder = tmp_path_factory.mktemp("undisturbed") / "bundle"
    bundle.save(folder)
    with serve(folder) as server, Client(folder / "client", server.url, threads=1) as client:
        losses = [one.metrics["loss"] for one in train(client, epochs=2).evaluations]
    assert losses[1] < losses[0]
    return read_state(folder)


def read_state(folder: Path) -> dict[str, np.ndarray]:
    parties = [PartyBundle.load(folder / name) for name in ("client", "server")]
    assert [party.step for party in parties] == [2 * PER_EPOCH, 2 * PER_EPOCH]
    return {name: array for party in parties for name, array in party.state().items()}


def expect_best(folder: Path, best: Mapping[str, np.ndarray]) -> None:
    for name, array in read_state(folder).items():
        np.testing.assert_array_equal(array, best[name])
    for party in ("client", "server"):
        assert not list((folder / party).glob("sessions/*/*"))


@pytest.mark.parametrize("every", [None, 1, 4])
def test_both_halves_end_as_after_the_best_epoch(
    folder: Path, best: Mapping[str, np.ndarray], every: int | None
) -> None:
    with serve(folder) as server, Client(folder / "client", server.url, threads=1) as client:
        history = train(client, stopping=STOPPING, checkpoint_every=every)
    assert history.best is not None
    assert (history.best.epoch, history.best.waited) == (1, WAITS)
    assert len(history.evaluations) == 2 + WAITS
    expect_best(folder, best)


@pytest.mark.parametrize("broken_off", [2, 7, 10])
def test_an_interrupted_run_waits_on_and_ends_alike(
    folder: Path, best: Mapping[str, np.ndarray], broken_off: int
) -> None:
    def stop(record: StepRecord) -> None:
        if record.step == broken_off:
            raise KeyboardInterrupt

    with (
        serve(folder) as server,
        pytest.raises(KeyboardInterrupt),
        Client(folder / "client", server.url, threads=1) as client,
    ):
        train(client, stopping=STOPPING, checkpoint_every=1, on_step=stop)
    with (
        serve(folder, resume=True) as server,
        Client(folder / "client", server.url, threads=1, resume=True, give_up_after=20) as client,
    ):
        history = train(client, stopping=STOPPING, checkpoint_every=1)
    assert history.best is not None
    assert history.best.epoch == 1
    expect_best(folder, best)


def kill(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def kill_where_it_keeps(
    write: Callable[..., None],
) -> Callable[..., None]:
    """Do as a client that is killed when its server wrote the second best state, and it did not."""

    def write_or_die(run: TrainingRun, *arguments: object, keep: bool = False) -> None:
        executor = arguments[0]
        assert isinstance(executor, Executor)
        if keep and executor.step > PER_EPOCH:
            raise KeyboardInterrupt
        write(run, *arguments, keep=keep)

    return write_or_die


@pytest.mark.parametrize("where", ["at the best", "before the server returns", "before saving"])
def test_a_client_that_is_killed_between_the_halves_ends_alike(
    folder: Path, best: Mapping[str, np.ndarray], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, serve(folder) as server:
        if where == "at the best":
            patch.setattr(TrainingRun, "write", kill_where_it_keeps(TrainingRun.write))
        elif where == "before the server returns":
            patch.setattr(Channel, "return_to_step", kill)
        else:
            patch.setattr(TaskRunner, "publish", kill)
        with (
            pytest.raises(KeyboardInterrupt),
            Client(folder / "client", server.url, threads=1) as client,
        ):
            train(client, stopping=STOPPING, checkpoint_every=2)
    with (
        serve(folder, resume=True) as server,
        Client(folder / "client", server.url, threads=1, resume=True, give_up_after=20) as client,
    ):
        train(client, stopping=STOPPING, checkpoint_every=2)
    expect_best(folder, best)


def test_a_server_that_lost_the_best_state_makes_both_find_it_again(
    folder: Path, best: Mapping[str, np.ndarray]
) -> None:
    def lose(record: StepRecord) -> None:
        if record.step == 11 and not lost:
            lost.extend((folder / "server").glob("sessions/*/6.best.safetensors"))
            lost[0].unlink()

    lost: list[Path] = []
    with serve(folder) as server, Client(folder / "client", server.url, threads=1) as client:
        history = train(client, stopping=STOPPING, on_step=lose)
    assert [record.step for record in history.steps] == list(range(1, 13))
    expect_best(folder, best)


def test_a_server_that_comes_back_still_has_the_best_state(
    folder: Path, best: Mapping[str, np.ndarray]
) -> None:
    servers = [serve(folder)]
    servers[0].__enter__()

    def restart(record: StepRecord) -> None:
        if record.step in (8, 12):
            servers[-1].close()
            servers.append(serve(folder, resume=True, port=servers[0].port))
            servers[-1].__enter__()

    with Client(folder / "client", servers[0].url, threads=1, give_up_after=20) as client:
        train(client, stopping=STOPPING, on_step=restart)
    servers[-1].close()
    expect_best(folder, best)


def test_a_run_is_not_resumed_with_other_settings(folder: Path) -> None:
    def stop(record: StepRecord) -> None:
        raise KeyboardInterrupt

    with serve(folder) as server:
        with (
            pytest.raises(KeyboardInterrupt),
            Client(folder / "client", server.url, threads=1) as client,
        ):
            train(client, stopping=STOPPING, checkpoint_every=1, on_step=lambda record: (
                stop(record) if record.step == 2 else None
            ))  # fmt: skip
        with (
            Client(folder / "client", server.url, threads=1, resume=True) as client,
            pytest.raises(UsageError, match="begun with stopping loss min, patience 2, not none"),
        ):
            train(client)


def test_a_model_left_whole_ends_at_its_best_state_without_a_folder() -> None:
    whole = cut(ZOO["dropout"].build(), at=None, optimizer=SGD())
    with Client(whole.client, None, threads=1) as client:
        for _ in range(2):
            client.fit(DATA, batch_size=8, learning_rate=0.1, shuffle=False)
        expected = client.state()
    with Client(whole.client, None, threads=1) as client:
        history = client.fit(
            DATA, epochs=9, batch_size=8, eval_data=DATA, learning_rate=find_rate, shuffle=False,
            stopping=STOPPING,
        )  # fmt: skip
        assert (client.steps, len(history.evaluations)) == (2 * PER_EPOCH, 2 + WAITS)
        for name, array in client.state().items():
            np.testing.assert_array_equal(array, expected[name])


def test_what_cannot_stop_early_is_refused_before_the_first_step(bundle: Bundle) -> None:
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with (
        Client(bundle.client, link, threads=1) as client,
        pytest.raises(UsageError, match="a server's URL or a function that connects"),
    ):
        train(client, stopping=STOPPING)


def test_a_server_without_a_folder_cannot_keep_the_best_state(bundle: Bundle) -> None:
    assert bundle.server is not None
    with (
        Server(bundle.server, threads=1) as server,
        Client(bundle.client, server.url, threads=1) as client,
        pytest.raises(NotSaved, match="no folder to save the state in"),
    ):
        client.fit(DATA, batch_size=8, eval_data=DATA, stopping=STOPPING)
