"""A client's half of a task on a loop: carried through, saved, gone back, and given up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import LocalProtocolError, NotSaved, StepsLost
from splitonnx.messages import TaskKey
from splitonnx.runtime.channels.asynchronous.threads import WorkThread
from splitonnx.runtime.client.asynchronous.runners import AsyncTaskRunner
from splitonnx.runtime.client.training_runs import TrainingRun
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from tests.support import tiny


class Server:
    """A channel to the tiny model's other half, computed by numpy, which fails as it is told."""

    def __init__(self) -> None:
        self.state = tiny.reference_state()
        self.calls: list[str] = []
        self.why_unsaved = ""
        self.breaks: BaseException | None = None
        self.in_flight = 1
        self.terms = None
        self._key: TaskKey | None = None
        self._sent: Mapping[str, np.ndarray] = {}

    def end(self, key: TaskKey) -> None:
        self.calls.append(f"end {key.phase} {key.step}")

    def end_all(self) -> None:
        self.calls.append("end all")

    async def send_wires(
        self, key: TaskKey, wires: Mapping[str, np.ndarray], seed: int, learning_rate: float
    ) -> None:
        if key != self._key:
            self.calls.append(f"begin {key.phase} {key.step}")
        self._key, self._sent = key, {**self._sent, **wires}

    async def receive_wires(self) -> tuple[TaskKey | None, dict[str, np.ndarray]]:
        if self.breaks is not None:
            raise self.breaks
        if self._key is not None and self._key.phase == "predict":
            return self._key, {"y": self._sent["h"] @ self.state["W2"].astype(np.float32)}
        h, labels = self._sent["h"], self._sent["labels"]
        difference = h @ self.state["W2"].astype(np.float32) - labels
        grad = 2 * difference / difference.size @ self.state["W2"].T.astype(np.float32)
        return self._key, {"h.grad": grad, "loss": np.mean(difference**2)}

    async def save(self, step: int, *, publish: bool = False, keep: bool = False) -> str:
        self.calls.append(f"{'publish' if publish else 'save'} {step}")
        return self.why_unsaved

    async def close(self, *, for_good: bool = True) -> None:
        self.calls.append("bye" if for_good else "hang up")


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def party(tmp_path: Path) -> PartyBundle:
    tiny.split_bundle().save(tmp_path / "bundle")
    return Bundle.load(tmp_path / "bundle").client


def play(
    party: PartyBundle,
    server: Server | None,
    act: Callable[[AsyncTaskRunner, Executor], Awaitable[None]],
) -> None:
    async def main() -> None:
        executor, thread = Executor(party, Engine(threads=1)), WorkThread()
        run = TrainingRun.open(executor, resume=False)
        runner = AsyncTaskRunner(executor, run, server, thread, seed=0)  # type: ignore[arg-type]
        await act(runner, executor)
        run.release()
        thread.close()

    asyncio.run(main())


def test_a_whole_model_s_step_is_numpy_s() -> None:
    async def act(runner: AsyncTaskRunner, executor: Executor) -> None:
        reference = tiny.reference_state()
        results = await runner.perform("train", tiny.batch(0), tiny.RATE)
        assert results["loss"] == pytest.approx(tiny.reference_step(reference, tiny.batch(0)), 1e-5)
        assert executor.step == 1
        for name, array in executor.state().items():
            np.testing.assert_allclose(array, reference[name], rtol=1e-5, atol=1e-6)

    play(tiny.local_bundle().client, None, act)


def test_a_step_goes_back_and_forth_between_the_two_halves(
    party: PartyBundle, server: Server
) -> None:
    async def act(runner: AsyncTaskRunner, executor: Executor) -> None:
        reference = tiny.reference_state()
        results = await runner.train(tiny.batch(0), tiny.RATE, 1)
        assert results["loss"] == pytest.approx(tiny.reference_step(reference, tiny.batch(0)), 1e-5)
        np.testing.assert_allclose(executor.state()["W1"], reference["W1"], rtol=1e-5, atol=1e-6)
        assert server.calls == ["begin train 0", "end train 0", "end all"]
        for _ in range(2):
            await runner.perform("predict", {"x": tiny.batch(0)["x"]}, 0.0)
        assert server.calls[3::3] == ["begin predict 0", "begin predict 1"]

    play(party, server, act)


@pytest.mark.parametrize("error", [asyncio.CancelledError(), ValueError("broken")])
def test_after_an_error_the_state_is_as_before_and_the_runner_is_closed(
    party: PartyBundle, server: Server, error: BaseException
) -> None:
    async def act(runner: AsyncTaskRunner, executor: Executor) -> None:
        before = executor.state()
        server.breaks = error
        with pytest.raises(type(error)):
            await runner.perform("train", tiny.batch(0), tiny.RATE)
        assert server.calls == ["begin train 0", "bye", "end all"]
        assert runner.is_closed
        for name, array in executor.state().items():
            np.testing.assert_array_equal(array, before[name])
        with pytest.raises(LocalProtocolError, match="closed"):
            await runner.perform("train", tiny.batch(0), tiny.RATE)
        await runner.close()
        assert server.calls.count("bye") == 1

    play(party, server, act)


def test_where_the_server_lost_steps_this_half_goes_back_too_and_can_go_on(
    party: PartyBundle, server: Server
) -> None:
    async def act(runner: AsyncTaskRunner, executor: Executor) -> None:
        before = executor.state()
        await runner.perform("train", tiny.batch(0), tiny.RATE)
        server.breaks = StepsLost(0)
        with pytest.raises(StepsLost):
            await runner.perform("train", tiny.batch(1), tiny.RATE)
        assert executor.step == 0
        np.testing.assert_array_equal(executor.state()["W1"], before["W1"])
        server.breaks = None
        await runner.perform("train", tiny.batch(0), tiny.RATE)
        assert executor.step == 1

    play(party, server, act)


def test_the_server_publishes_first_and_the_session_is_kept_where_this_half_did_not(
    party: PartyBundle, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(runner: AsyncTaskRunner, executor: Executor) -> None:
        await runner.perform("train", tiny.batch(0), tiny.RATE)
        server.why_unsaved = "disk full"
        with pytest.raises(NotSaved, match="disk full"):
            await runner.publish()
        server.why_unsaved = ""

        def fail(*_: object) -> None:
            raise NotSaved("this folder", "it is gone")

        with monkeypatch.context() as patched:
            patched.setattr(TrainingRun, "publish", fail)
            with pytest.raises(NotSaved, match="it is gone"):
                await runner.publish()
        await runner.close()
        assert server.calls[3:] == ["publish 1", "publish 1", "hang up"]

    play(party, server, act)


def test_a_finished_run_says_good_bye(party: PartyBundle, server: Server) -> None:
    async def act(runner: AsyncTaskRunner, executor: Executor) -> None:
        await runner.perform("train", tiny.batch(0), tiny.RATE)
        await runner.publish()
        await runner.close()
        assert server.calls[-1] == "bye"
        assert party.path is not None
        assert PartyBundle.load(party.path).step == 1

    play(party, server, act)
