"""A server's model counts its own updates, whoever's step each of them is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import PartyBundle
from splitonnx.errors import BundleError
from splitonnx.messages import TaskKey
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine.engines import Engine, LoadedStage, Tensor
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.models import ServerModel
from splitonnx.runtime.server.policies.tasks import Delivery, Task
from splitonnx.runtime.storage.archives import Archive
from splitonnx.states import read_state
from tests.support import tiny
from tests.support.registries import ANN
from tests.support.zoo import ZOO

FIRST = {"h": np.ones((2, 4), np.float32)}
SECOND = {"labels": np.zeros((2, 2), np.float32)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.split_bundle().save(tmp_path / "bundle")
    return tmp_path / "bundle" / "server"


def open_model(folder: Path) -> ServerModel:
    party = PartyBundle.load(folder)
    archive = Archive(folder, party.manifest, most_bytes=None, keep_seconds=None)
    start = Executor(party, Engine(threads=1))
    start.prepare("train")
    return ServerModel(
        ANN,
        owner="ann",
        executor=start.fork(),
        start=start,
        store=archive.open_store(ANN),
        archive=archive,
    )


def update(model: ServerModel, step: int = 0) -> TaskKey:
    """Let a client's step change the model."""
    key = TaskKey(ANN, "train", step, 0)
    model.begin(key, seed=0, learning_rate=0.1)
    sent = list(model.run(key, FIRST))
    assert not model.finish(key)
    sent += model.run(key, SECOND)
    assert {name for wires in sent for name in wires} == {"h.grad", "loss"}
    assert model.finish(key)
    return key


def test_the_version_is_the_optimizer_s_step_and_not_the_client_s(folder: Path) -> None:
    own, other = open_model(folder), open_model(folder)
    for step in (0, 1, 2):
        update(own, step)
    for step in (9, 0, 4):
        update(other, step)
    assert own.version == other.version == 3
    found = other.executor.state()
    for name, array in own.executor.state().items():
        assert array.tobytes() == found[name].tobytes(), name


def test_an_abandoned_task_changes_nothing(folder: Path) -> None:
    model = open_model(folder)
    before = model.executor.state()
    key = TaskKey(ANN, "train", 0, 0)
    model.begin(key, seed=0, learning_rate=0.1)
    list(model.run(key, FIRST))
    model.abandon(key)
    model.abandon(key)
    assert model.version == 0
    for name, array in model.executor.state().items():
        np.testing.assert_array_equal(array, before[name])
    update(model)
    assert model.version == 1


def test_a_model_goes_back_to_what_was_saved_or_to_its_start(folder: Path) -> None:
    model = open_model(folder)
    update(model)
    assert not model.is_saved
    model.save()
    assert model.is_saved
    kept = model.executor.state()
    update(model)
    assert set(model.list_versions()) == {0, 1}
    model.rewind(1)
    for name, array in model.executor.state().items():
        np.testing.assert_array_equal(array, kept[name])
    model.rewind(0)
    np.testing.assert_array_equal(model.executor.state()["W2"], tiny.WEIGHTS["W2"])
    assert (model.version, model.is_saved, model.list_versions()) == (0, True, (0,))


def test_only_what_was_published_is_removed(folder: Path) -> None:
    model = open_model(folder)
    update(model)
    model.save()
    model.remove_published()
    assert set(model.list_versions()) == {0, 1}
    model.save(publish=True)
    model.remove_published()
    assert model.list_versions() == (0,)
    outcome = read_state(folder, PartyBundle.load(folder).manifest, ANN)
    assert outcome is not None
    assert (outcome.step, outcome.session, outcome.owner) == (1, ANN, "ann")


def test_unsaved_changes_are_written_when_the_model_leaves_the_memory(folder: Path) -> None:
    model = open_model(folder)
    model.unload()
    assert not (folder / "sessions").exists()
    update(model)
    model.unload()
    assert model.is_saved
    assert set(open_model(folder).list_versions()) == {0, 1}


def test_a_model_without_a_folder_cannot_be_saved() -> None:
    server = tiny.split_bundle().server
    assert server is not None
    executor = Executor(server, Engine(threads=1))
    model = ServerModel(ANN, owner="", executor=executor, start=None, store=None)
    with pytest.raises(BundleError, match="no folder"):
        model.save()
    model.unload()
    assert (model.list_versions(), model.is_lost) == ((), False)
    model.close()


def test_a_step_that_is_given_up_between_two_micro_batches_changes_nothing() -> None:
    party = cut(ZOO["chain"].build(), at="act1").server
    assert party is not None
    executor = Executor(party, Engine(threads=1))
    model = ServerModel(ANN, owner="ann", executor=executor, start=None, store=None)
    before = executor.state()
    shape = next(
        wire.tensor.shape
        for wire in party.manifest.phase("accumulate").wires
        if wire.tensor.name == "act1@server"
    )
    rows = (2, *(dim for dim in shape[1:] if isinstance(dim, int)))
    batch: dict[str, np.ndarray] = {
        "act1@server": np.ones(rows, np.float32),
        "labels@server": np.zeros(2, np.int64),
        "splitonnx.weight": np.array(1, np.float32),
    }
    for number in range(2):
        key = TaskKey(ANN, "accumulate", 5, number)  # the client's step is another
        model.begin(key, seed=0, learning_rate=0.1)
        list(model.run(key, batch))
        assert model.finish(key)
    assert model.version == 0
    model.abandon(key)
    first = TaskKey(ANN, "accumulate", 5, 0)
    model.begin(first, seed=0, learning_rate=0.1)  # the step begins again
    for name, array in executor.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_what_waits_for_an_earlier_micro_batch_follows_it_in_order() -> None:
    bundle = cut(ZOO["chain"].build(), at="act0", tail_at="act2")
    assert bundle.server is not None
    model = ServerModel(
        ANN, owner="", executor=Executor(bundle.server, Engine(threads=1)), start=None, store=None
    )

    def submit(number: int, turn: int, tensors: dict[str, np.ndarray]) -> list[tuple[int, str]]:
        phase = "update" if number == 2 else "accumulate"
        task = Task(
            key=TaskKey(ANN, phase, 5, number),
            turn=turn,
            seed=0,
            learning_rate=0.1,
            tensors=tensors,
        )
        return [
            (delivery.key.micro_batch, ", ".join(delivery.tensors) or "end")
            for delivery in model.perform(task)
        ]

    forward = {
        "act0@server": np.ones((2, 8), np.float32),
        "splitonnx.weight": np.array(0.5, np.float32),
    }
    backward = {"act2@client_grad": np.ones((2, 8), np.float32)}
    for number in range(2):
        assert submit(number, 0, forward) == [(number, "act2@client")]
    assert submit(2, 0, {"splitonnx.micro_batches": np.array(2)}) == []
    assert submit(1, 1, backward) == [(1, "act0@server_grad")]
    assert submit(0, 1, backward) == [
        (0, "act0@server_grad"),
        (0, "end"),
        (1, "end"),
        (2, "splitonnx.confirmed"),
        (2, "end"),
    ]
    assert model.version == 1


def test_the_client_has_the_confirmation_before_the_server_updates() -> None:
    bundle = cut(ZOO["chain"].build(), at="act0")
    assert bundle.server is not None
    executor = Executor(bundle.server, Engine(threads=1))
    model = ServerModel(ANN, owner="", executor=executor, start=None, store=None)
    batch: dict[str, np.ndarray] = {
        "act0@server": np.ones((2, 8), np.float32),
        "labels@server": np.zeros(2, np.int64),
        "splitonnx.weight": np.array(1, np.float32),
    }

    def submit(phase: str, number: int, tensors: dict[str, np.ndarray]) -> Iterator[Delivery]:
        key = TaskKey(ANN, phase, 0, number)
        return model.perform(Task(key=key, turn=0, seed=0, learning_rate=0.1, tensors=tensors))

    list(submit("accumulate", 0, batch))
    phase = executor.manifest.phase("update")
    ran: list[str] = []
    run = executor._engine.run

    def note(stage: LoadedStage, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ran.append(stage.name)
        return run(stage, feeds)

    executor._engine.run = note  # type: ignore[method-assign]
    deliveries = submit("update", 1, {"splitonnx.micro_batches": np.array(1)})
    assert list(next(deliveries).tensors) == ["splitonnx.confirmed"]
    assert "update" not in ran
    assert model.version == 0
    assert next(deliveries).is_last
    assert ran == [stage.name for stage in phase.stages]
    assert model.version == 1
