"""Sessions whose stages run in workers: the same numbers, and a crash stays where it is."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import ProcessFailed, RemoteFault
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import StepRecord
from splitonnx.runtime.edge.tokens import Tokens, add_token
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.server.servers import Server
from splitonnx.runtime.workers import processes
from splitonnx.runtime.workers.processes import Worker
from tests.support import tiny
from tests.support.clinics import (
    DATA,
    OWNERS,
    Clinic,
    check_equal,
    make_options,
    needs_linux,
    open_clinic,
    train_in_process,
)
from tests.support.endless import endless_bundle, stuck_bundle
from tests.support.zoo import ZOO


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> dict[str, np.ndarray]:
    """What training comes to in the server's own process."""
    return train_in_process(bundle)


def test_on_loopback_without_tokens_stages_run_in_the_server_unless_it_is_told_otherwise() -> None:
    bundle = tiny.split_bundle()
    assert bundle.server is not None
    for chosen, isolates in ((None, False), (False, False), (True, True)):
        with Server(bundle.server, port=0, isolate=chosen) as server:
            assert (server._workers is not None) is isolates


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


def test_a_worker_computes_on_the_server_s_provider() -> None:
    party = tiny.split_bundle().parties["server"]
    with pytest.raises(ProcessFailed, match=r"splitonnx\[openvino\]"):
        Worker(replace(make_options(party), provider="openvino"), lambda: 0)
