"""A server that loses steps: a client makes them again, as long as new ones come in between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, StepsLost
from splitonnx.messages import Hello, Message, Tensors, Welcome, decode_message, encode_message
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.training_loops import MOST_RETURNS
from splitonnx.runtime.wire.protocols import list_wires
from tests.support import tiny

ROWS = 6
EPOCHS = 3  # a step each


class Forgetful:
    """A server that loses all steps, each time when so many were made as ``losses`` says next."""

    def __init__(self, bundle: Bundle, losses: list[int]) -> None:
        self.bytes_sent = self.bytes_received = 0
        self._bundle = bundle
        self._losses = losses
        self._asked: Message | None = None

    def send(self, chunks: Sequence[Chunk]) -> None:
        self._asked, _ = decode_message(b"".join(chunks))

    def receive(self) -> bytes:
        asked = self._asked
        if isinstance(asked, Hello):
            manifest = self._bundle.client.manifest
            wires = list_wires(manifest)
            return b"".join(
                encode_message(
                    Welcome(
                        session=asked.session, digest=manifest.digest, step=asked.start, wires=wires
                    )
                )
            )
        assert isinstance(asked, Tensors)
        if self._losses and asked.step == self._losses[0]:
            del self._losses[0]
            raise ConnectionLost("the server", "it closed")
        gradient = np.full((ROWS, 4), 0.1, np.float32)
        reply = {"h.grad": gradient, "loss": np.array(1.0, np.float32)}
        return b"".join(encode_message(asked, reply))

    def close(self) -> None:
        pass


def test_a_server_that_loses_the_same_step_again_and_again_is_given_up(tmp_path: Path) -> None:
    bundle = tiny.split_bundle()
    bundle.client.save(tmp_path / "client")
    losses = [1] * (2 * MOST_RETURNS)
    client = Client(tmp_path / "client", lambda: Forgetful(bundle, losses))
    with client, pytest.raises(StepsLost, match="both sides went back to step 0"):
        client.fit(tiny.batch(1, ROWS), batch_size=ROWS, epochs=EPOCHS, checkpoint_every=100)
    assert len(losses) == MOST_RETURNS - 1  # the first one was of a step that was new
    assert client.steps == 0


def test_a_client_that_gives_up_lets_others_train_in_the_folder_before_it_closes(
    tmp_path: Path,
) -> None:
    bundle = tiny.split_bundle()
    bundle.client.save(tmp_path / "client")
    data = tiny.batch(1, ROWS)
    with Client(tmp_path / "client", lambda: Forgetful(bundle, [1] * 500)) as client:
        with pytest.raises(StepsLost):
            client.fit(data, batch_size=ROWS, epochs=EPOCHS, checkpoint_every=100)
        party = PartyBundle.load(tmp_path / "client")
        with Client(party, lambda: Forgetful(bundle, [])) as other:
            history = other.fit(data, batch_size=ROWS, epochs=EPOCHS, checkpoint_every=100)
        assert len(history.steps) == EPOCHS


def test_a_server_that_loses_each_step_often_is_trained_with_as_long_as_new_ones_come() -> None:
    bundle = tiny.split_bundle()
    losses = [1] * MOST_RETURNS + [2] * MOST_RETURNS
    with Client(bundle.client, lambda: Forgetful(bundle, losses)) as client:
        history = client.fit(tiny.batch(1, ROWS), batch_size=ROWS, epochs=EPOCHS)
    assert [record.step for record in history.steps] == [1, 2, 3]
    assert losses == []
