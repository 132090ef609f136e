"""One model on the server for many clients: what equals what, and what no client can do."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitonnx.bundles import PartyBundle
from splitonnx.errors import StepEnded, TaskTooLarge, UsageError, WorkerLost
from splitonnx.messages import Fault
from splitonnx.names import (
    ASYNCHRONOUS,
    CLIENT,
    PER_CLIENT,
    SERVER,
    SPLITFED_V2,
    SYNCHRONOUS,
    TRAIN,
)
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import StepRecord
from splitonnx.runtime.engine.estimates import Estimates
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.server.policies.model_makers import ModelMaker
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.servers import Server
from splitonnx.runtime.server.sessions import MOST_DEFERRED
from splitonnx.runtime.storage.round_records import RoundRecord, RoundRecords
from splitonnx.sharing import list_joined, name_own
from splitonnx.stopping import EarlyStopping
from tests.support.one_model import (
    ACTIVATION,
    ENTRY,
    MOMENTUM,
    ROWS,
    Member,
    Table,
    activation,
    gradient,
    make_bundle,
)
from tests.support.zoo import ZOO


def test_a_client_that_sends_other_tensors_fails_alone() -> None:
    table = Table(SYNCHRONOUS)
    wrong, honest = table.members
    wrong.train(0, gradient())
    honest.train(0, activation())
    assert isinstance(honest.error, StepEnded)
    assert isinstance(wrong.error, StepEnded)
    honest = honest.again()
    honest.train(0, activation())
    honest.train(1, gradient())
    assert [list(tensors) for _, tensors in honest.heard] == [
        ["act3@client"],
        [f"{ACTIVATION}_grad"],
    ]
    assert table.version == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first", "last"])
def test_a_client_whose_loss_is_not_finite_fails_alone(order: tuple[int, int]) -> None:
    bundle = cut(ZOO["mse"].build(), at="act0", loss="mse", optimizer=MOMENTUM)
    sent = {w.tensor.name: w.tensor for w in bundle.client.manifest.phase(TRAIN).wires}
    del sent["act0@server_grad"], sent["loss"]
    shapes = {
        name: (ROWS, *(size for size in spec.shape[1:] if isinstance(size, int)))
        for name, spec in sent.items()
    }
    good, bad = (
        {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}
        for value in (0.1, 3e38)
    )
    table = Table(SYNCHRONOUS, bundle=bundle)
    for number in order:
        table.members[number].train(0, good if number else bad)
    assert all(isinstance(member.error, StepEnded) for member in table.members)
    wrong, honest = table.members[0].again(), table.members[1].again()
    wrong.train(0, bad)
    (fault, _) = wrong.heard[-1]
    assert isinstance(fault, Fault)
    assert fault.code == "NotFinite"
    honest.train(0, good)
    assert honest.error is None
    assert table.version == 1


def test_only_the_client_with_another_learning_rate_is_refused() -> None:
    table = Table(SYNCHRONOUS, clients=3)
    wrong, *others = table.members
    wrong.train(0, activation(), rate=5.0)
    for member in others:
        member.train(0, activation())
    (fault, _) = wrong.heard[-1]
    assert isinstance(fault, Fault)
    assert "its learning rate 5 differs" in fault.reason
    for member in others:
        member.train(1, gradient())
        assert member.error is None
    assert table.version == 1


def test_a_client_cannot_fill_the_memory_of_a_step_that_waits() -> None:
    table = Table(SYNCHRONOUS)
    greedy, other = table.members
    greedy.train(0, activation())
    other.train(0, activation())
    for turn in range(1, MOST_DEFERRED + 3):
        greedy.train(turn, gradient())
    (fault, _) = greedy.heard[-1]
    assert isinstance(fault, Fault)
    assert "it goes on before its step has ended" in fault.reason
    table.tick()
    assert isinstance(other.error, StepEnded)


def test_a_client_that_has_not_received_the_model_cannot_train_it() -> None:
    table = Table(SPLITFED_V2)
    outsider = Member(table, "f" * 32)
    outsider.train(0, activation())
    (fault, _) = outsider.heard[-1]
    assert isinstance(fault, Fault)
    assert "before it has received the joined model" in fault.reason
    assert table.version == 0


@pytest.mark.parametrize("policy", [SPLITFED_V2, SYNCHRONOUS])
def test_whoever_waits_for_a_lost_model_is_told(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(policy)
    waiting, _ = table.members
    if policy != SYNCHRONOUS:
        waiting.train(0, activation())
        waiting.train(1, gradient())
        waiting.share(1, samples=ROWS)
    else:
        waiting.train(0, activation())
    lost = table.registry.policy._model  # type: ignore[attr-defined]
    kind = type(lost)
    is_lost = property(lambda model: model is lost)
    monkeypatch.setattr(kind, "is_lost", is_lost)
    table.tick()
    assert isinstance(waiting.error, WorkerLost)
    assert table.version == 0
    again = waiting.again()
    assert again.error is None


def fit(
    folder: Path, url: str, data: Mapping[str, np.ndarray], *, epochs: int = 1, save: bool = False
) -> dict[str, np.ndarray]:
    """Train a copy of a bundle's client, and return its state."""
    with Client(PartyBundle.load(folder / CLIENT), url, threads=1, share=True) as client:
        client.fit(data, epochs=epochs, batch_size=ROWS, shuffle=False, save=save)
        return client.state()


def serve(folder: Path, policy: str, *, clients: int = 1) -> Server:
    options = PolicyOptions(name=policy, clients_min=clients, round_timeout=20.0)
    return Server(PartyBundle.load(folder / SERVER), port=0, threads=1, policy=options)


def read_outcome(folder: Path) -> dict[str, np.ndarray]:
    return dict(PartyBundle.load(folder / SERVER).state())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Write a bundle to a folder."""
    make_bundle().save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_one_client_of_splitfed_v2_trains_as_alone(tmp_path: Path) -> None:
    data, states, outcomes = ENTRY.data(5 * ROWS), [], []
    for policy in (PER_CLIENT, SPLITFED_V2, SYNCHRONOUS):
        folder = tmp_path / policy
        make_bundle().save(folder)
        with serve(folder, policy) as server:
            states.append(fit(folder, server.url, data, epochs=2, save=True))
        outcomes.append(read_outcome(folder))
    for found in (states, outcomes):
        for other in found[1:]:
            assert other.keys() == found[0].keys()
            for name, array in other.items():
                np.testing.assert_array_equal(array, found[0][name], err_msg=name)


def test_a_share_moves_the_joined_part_by_its_weight(home: Path) -> None:
    """With one client, each share is based on the newest model, and moves it by 0.6 of the way."""
    data = ENTRY.data(ROWS)
    with serve(home, ASYNCHRONOUS) as server:
        found = fit(home, server.url, data)
    start = make_bundle().client.state()
    with serve(home, PER_CLIENT) as server:
        trained = fit(home, server.url, data)
    for name in list_joined(make_bundle().client.manifest):
        expected = 0.4 * start[name].astype(float) + 0.6 * trained[name].astype(float)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-7, err_msg=name)
        assert not np.array_equal(found[name], trained[name])


def test_a_client_that_leaves_first_publishes_what_it_left_with(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: dict[int, dict[str, np.ndarray]] = {}
    write = RoundRecords.write

    def keep(self: RoundRecords, record: RoundRecord) -> None:
        records[record.number] = {name: np.array(array) for name, array in record.tensors.items()}
        write(self, record)

    monkeypatch.setattr(RoundRecords, "write", keep)
    data, left, longer = ENTRY.data(2 * ROWS), threading.Event(), threading.Event()
    publish = ModelMaker.publish

    def publish_late(self: ModelMaker, *arguments: Any, **more: Any) -> None:
        if not left.is_set():
            left.set()
            assert longer.wait(30)  # until the other one has trained on
        publish(self, *arguments, **more)

    def train_longer(client: Client, url: str) -> None:
        def notice(record: StepRecord) -> None:
            if record.step == 6:
                assert left.wait(30)
            if record.step == 9:
                longer.set()

        client.fit(
            data, epochs=5, batch_size=ROWS, shuffle=False, on_step=notice, checkpoint_every=None
        )

    monkeypatch.setattr(ModelMaker, "publish", publish_late)
    with (
        serve(home, SPLITFED_V2, clients=2) as server,
        Client(make_bundle().client, server.url, threads=1, share=True) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        longest = pool.submit(train_longer, other, server.url)
        state = fit(home, server.url, data, epochs=2, save=True)
        longest.result()
    own = list_joined(make_bundle().client.manifest)
    (number,) = [
        number
        for number, tensors in records.items()
        if all(np.array_equal(tensors[name_own(name)], state[name]) for name in own)
    ]
    assert number < max(records)
    for name, array in read_outcome(home).items():
        np.testing.assert_array_equal(array, records[number][name], err_msg=name)


def test_early_stopping_is_refused_with_why(home: Path) -> None:
    data = ENTRY.data(ROWS)
    with (
        serve(home, SPLITFED_V2) as server,
        Client(PartyBundle.load(home / CLIENT), server.url, share=True) as client,
        pytest.raises(UsageError, match=r"policy 'splitfed-v2' its model is also that of other"),
    ):
        client.fit(
            data, epochs=1, eval_data=data, stopping=EarlyStopping(metric="loss", patience=1)
        )


def test_a_client_whose_batch_does_not_fit_beside_the_others_is_refused(home: Path) -> None:
    homes = [home, home.with_name("other")]
    shutil.copytree(home, homes[1])
    party = PartyBundle.load(home / SERVER)
    options = PolicyOptions(name=SYNCHRONOUS, clients_min=2, round_timeout=3.0)
    one = Estimates(party.manifest, party.graphs).measure(TRAIN, {"N": ROWS})
    data, limits = ENTRY.data(ROWS), Limits(task_bytes=one * 3 // 2)
    with (
        Server(party, port=0, threads=1, policy=options, limits=limits) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        fits = [pool.submit(fit, homes[n], server.url, data) for n in range(2)]
        ends = [fit.exception() for fit in fits]  # the other one trains on without it
    assert {type(end) for end in ends} == {TaskTooLarge, type(None)}


def test_a_model_that_is_not_finite_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    table = Table(SPLITFED_V2, clients=1)
    (member,) = table.members
    member.train(0, activation())
    member.train(1, gradient(3e38))
    member.share(1, samples=ROWS)
    assert "round 1 is kept in memory alone" in caplog.text
    assert "holds NaN or infinity" in caplog.text
