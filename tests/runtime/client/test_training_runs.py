"""Training that is interrupted resumes where it was, and ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import ConnectionLost, RemoteFault, UnfinishedRun, UsageError
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import StepRecord
from splitonnx.runtime.server.servers import Server
from splitonnx.schedules import CosineSchedule, Schedule, plan_rates
from tests.support.zoo import ZOO

DATA = ZOO["dropout"].data(40)
EPOCHS, BATCH, EVERY = 3, 8, 4
STEPS = EPOCHS * 40 // BATCH


@pytest.fixture(scope="module", params=[(), "pool"], ids=["vanilla", "U-shaped"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """Dropout and BatchNormalization on both sides of the cut."""
    return cut(ZOO["dropout"].build(), at="d1", tail_at=request.param)


@pytest.fixture
def folder(bundle: Bundle, tmp_path: Path) -> Path:
    bundle.save(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture(scope="module")
def undisturbed(
    bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("undisturbed") / "bundle"
    bundle.save(folder)
    with serve(folder) as server, open_client(folder, server) as client:
        fit(client)
        client.save()
    return read_state(folder)


def serve(folder: Path, *, resume: bool = False, port: int = 0) -> Server:
    return Server(folder / "server", port=port, threads=1, resume=resume)


def open_client(folder: Path, server: Server, *, resume: bool = False) -> Client:
    return Client(folder / "client", server.url, threads=1, resume=resume, give_up_after=20)


def fit(client: Client, stop_after: int | None = None) -> list[int]:
    """Train, and return the steps that were recorded; ``stop_after`` breaks off there."""

    def count(record: StepRecord) -> None:
        if record.step == stop_after:
            raise KeyboardInterrupt

    history = client.fit(
        DATA, epochs=EPOCHS, batch_size=BATCH, checkpoint_every=EVERY, on_step=count
    )
    return [record.step for record in history.steps]


def read_state(folder: Path) -> dict[str, np.ndarray]:
    parties = [PartyBundle.load(folder / name) for name in ("client", "server")]
    assert [party.step for party in parties] == [STEPS, STEPS]
    assert len({party.session for party in parties}) == 1
    return {name: array for party in parties for name, array in party.state().items()}


def expect_equal(folder: Path, undisturbed: Mapping[str, np.ndarray]) -> None:
    state = read_state(folder)
    assert state.keys() == undisturbed.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(array, undisturbed[name])


@pytest.mark.parametrize("broken_off", [1, 4, 7, 14])
def test_a_client_that_was_killed_resumes_where_its_checkpoint_is(
    folder: Path, undisturbed: Mapping[str, np.ndarray], broken_off: int
) -> None:
    with serve(folder) as server:
        with pytest.raises(KeyboardInterrupt):
            fit(Client(folder / "client", server.url, threads=1), stop_after=broken_off)
        with open_client(folder, server, resume=True) as client:
            made = fit(client)
            client.save()
    assert made == list(range((broken_off - 1) // EVERY * EVERY + 1, STEPS + 1))
    expect_equal(folder, undisturbed)


def test_a_run_that_was_closed_before_its_end_goes_on_at_the_same_server(
    folder: Path, undisturbed: Mapping[str, np.ndarray]
) -> None:
    with serve(folder) as server:
        with pytest.raises(KeyboardInterrupt), open_client(folder, server) as client:
            fit(client, stop_after=7)
        with open_client(folder, server, resume=True) as client:
            made = fit(client)
            client.save()
    assert made == list(range(EVERY + 1, STEPS + 1))
    expect_equal(folder, undisturbed)


def test_a_server_that_stops_and_comes_back_loses_no_step(
    folder: Path, undisturbed: Mapping[str, np.ndarray]
) -> None:
    servers = [serve(folder)]
    servers[0].__enter__()

    def restart(record: StepRecord) -> None:
        if record.step in (2, 5, 12):
            servers[-1].close()
            servers.append(serve(folder, resume=True, port=servers[0].port))
            servers[-1].__enter__()

    with open_client(folder, servers[0]) as client:
        history = client.fit(
            DATA, epochs=EPOCHS, batch_size=BATCH, checkpoint_every=EVERY, on_step=restart
        )
        client.save()
    servers[-1].close()
    assert [record.step for record in history.steps] == list(range(1, STEPS + 1))
    expect_equal(folder, undisturbed)


def test_a_server_that_lost_its_newest_steps_goes_back_with_the_client(
    folder: Path, undisturbed: Mapping[str, np.ndarray]
) -> None:
    server = serve(folder)
    server.__enter__()
    seen: list[int] = []
    servers = [server]

    def crash(record: StepRecord) -> None:
        seen.append(record.step)
        if seen in ([1, 2], [1, 2, 1, 2, 3, 4, 5, 6]):
            servers[-1]._registry.unload_all = lambda: None  # type: ignore[method-assign]
            servers[-1].close()
            servers.append(serve(folder, resume=True, port=server.port))
            servers[-1].__enter__()

    with open_client(folder, server) as client:
        history = client.fit(
            DATA, epochs=EPOCHS, batch_size=BATCH, checkpoint_every=EVERY, on_step=crash
        )
        client.save()
    servers[-1].close()
    assert seen == [1, 2, *range(1, 7), *range(5, STEPS + 1)]
    assert [record.step for record in history.steps] == list(range(1, STEPS + 1))
    expect_equal(folder, undisturbed)


def test_a_run_that_was_broken_off_is_not_begun_again_unasked(folder: Path) -> None:
    with serve(folder) as server:
        with pytest.raises(KeyboardInterrupt):
            fit(Client(folder / "client", server.url, threads=1), stop_after=5)
        with open_client(folder, server) as client:
            with pytest.raises(UnfinishedRun, match="step 4; continue with --resume"):
                fit(client)
            history = client.fit(DATA, batch_size=BATCH, checkpoint_every=EVERY, restart=True)
    assert [record.step for record in history.steps] == [1, 2, 3, 4, 5]


def test_a_run_goes_on_with_the_batches_that_it_began_with(folder: Path) -> None:
    with serve(folder) as server:
        with pytest.raises(KeyboardInterrupt):
            fit(Client(folder / "client", server.url, threads=1), stop_after=5)
        with (
            open_client(folder, server, resume=True) as client,
            pytest.raises(UsageError, match="batch size 8, not 4"),
        ):
            client.fit(DATA, epochs=EPOCHS, batch_size=4)


def test_a_run_goes_on_with_the_schedule_that_it_began_with(folder: Path) -> None:
    def train(client: Client, schedule: Schedule | None, *, stops: bool = False) -> list[float]:
        def stop(record: StepRecord) -> None:
            if stops and record.step == 6:
                raise KeyboardInterrupt

        history = client.fit(
            DATA, epochs=EPOCHS, batch_size=BATCH, schedule=schedule, checkpoint_every=EVERY,
            on_step=stop,
        )  # fmt: skip
        return [record.learning_rate for record in history.steps]

    schedule = CosineSchedule(warmup=5)
    plan = plan_rates(schedule, epochs=EPOCHS, steps_per_epoch=STEPS // EPOCHS)
    with serve(folder) as server:
        with pytest.raises(KeyboardInterrupt), open_client(folder, server) as client:
            train(client, schedule, stops=True)
        with (
            open_client(folder, server, resume=True) as client,
            pytest.raises(UsageError, match=r"begun with schedule cosine.*over 15 steps, not none"),
        ):
            train(client, None)
        with open_client(folder, server, resume=True) as client:
            rates = train(client, schedule)
            base = client.manifest.learning_rate
    factors = [plan.get_factor(step // 5, step % 5) for step in range(EVERY, STEPS)]
    assert rates == [base * factor for factor in factors]


def test_resuming_what_was_finished_makes_no_step(
    folder: Path, undisturbed: Mapping[str, np.ndarray]
) -> None:
    for _ in range(2):
        with serve(folder) as server, open_client(folder, server, resume=True) as client:
            made = fit(client)
            client.save()
    assert made == []
    expect_equal(folder, undisturbed)


def test_a_session_that_the_server_does_not_have_is_not_begun_again_in_silence(
    folder: Path,
) -> None:
    with serve(folder) as server, pytest.raises(KeyboardInterrupt):
        fit(Client(folder / "client", server.url, threads=1), stop_after=5)
    with serve(folder) as server, pytest.raises(RemoteFault, match="serve with --resume"):
        open_client(folder, server, resume=True)


def test_giving_up_says_that_the_connection_is_lost(folder: Path) -> None:
    with serve(folder) as server:
        url = server.url
    with pytest.raises(ConnectionLost):
        Client(folder / "client", url, give_up_after=0.2)


def test_the_halves_of_a_session_are_found_together_when_another_was_saved_last(
    folder: Path, tmp_path: Path, bundle: Bundle
) -> None:
    bundle.save(tmp_path / "second")
    with serve(folder) as server:
        for client_folder in (folder, tmp_path / "second"):
            with open_client(client_folder, server) as client:
                client.fit(DATA, batch_size=BATCH, epochs=1 if client_folder == folder else 2)
                client.save()
    both = Bundle.load(folder)
    assert both.server is not None
    assert both.client.step == both.server.step == 5


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Reconnecting is logged as a warning; here it is what is meant to happen."""
    with caplog.at_level("ERROR", "splitonnx"):
        yield
