"""A server that loses steps: a client makes them again, as long as new ones come in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitonnx.errors import StepsLost
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.training_loops import MOST_RETURNS
from tests.support import tiny
from tests.support.tiny_servers import TinyServer

ROWS = 6
EPOCHS = 3  # a step each


def test_a_server_that_loses_the_same_step_again_and_again_is_given_up() -> None:
    server = TinyServer(bundle=tiny.split_bundle(), losses=[1] * (2 * MOST_RETURNS))
    client = Client(server.bundle.client, server.dial)
    with client, pytest.raises(StepsLost, match="both sides went back to step 0"):
        client.fit(tiny.batch(1, ROWS), batch_size=ROWS, epochs=EPOCHS)
    assert len(server.losses) == MOST_RETURNS - 1  # the first one was of a step that was new
    assert client.steps == 0


def test_a_client_that_gives_up_lets_others_train_in_the_folder_before_it_closes(
    tmp_path: Path,
) -> None:
    bundle = tiny.split_bundle()
    bundle.client.save(tmp_path / "client")
    forgetful, honest = TinyServer(bundle=bundle, losses=[1] * 500), TinyServer(bundle=bundle)
    data = tiny.batch(1, ROWS)
    with Client(tmp_path / "client", forgetful.dial) as client:
        with pytest.raises(StepsLost):
            client.fit(data, batch_size=ROWS, epochs=EPOCHS, checkpoint_every=100)
        with Client(tmp_path / "client", honest.dial) as other:
            history = other.fit(data, batch_size=ROWS, epochs=EPOCHS, checkpoint_every=100)
        assert len(history.steps) == EPOCHS


def test_a_server_that_loses_each_step_often_is_trained_with_as_long_as_new_ones_come() -> None:
    losses = [1] * MOST_RETURNS + [2] * MOST_RETURNS
    server = TinyServer(bundle=tiny.split_bundle(), losses=losses)
    with Client(server.bundle.client, server.dial) as client:
        history = client.fit(tiny.batch(1, ROWS), batch_size=ROWS, epochs=EPOCHS)
    assert [record.step for record in history.steps] == [1, 2, 3]
    assert server.losses == []
