"""The one interface of every way from a client on a loop to its server."""

from __future__ import annotations

import inspect

import pytest

from splitonnx.runtime.channels.asynchronous.queued_sending import QueuedSending
from splitonnx.runtime.channels.asynchronous.transports import AsyncTransport
from splitonnx.runtime.channels.asynchronous.websockets import AsyncWebSocketTransport
from splitonnx.runtime.wire.transports import Transport


@pytest.mark.parametrize("kind", [AsyncWebSocketTransport, QueuedSending])
@pytest.mark.parametrize("name", ["send", "receive", "close", "abort"])
def test_every_way_is_used_in_the_same_words(kind: type, name: str) -> None:
    promised, given = getattr(AsyncTransport, name), getattr(kind, name)
    assert list(inspect.signature(given).parameters) == list(inspect.signature(promised).parameters)
    assert inspect.iscoroutinefunction(given) is inspect.iscoroutinefunction(promised)


@pytest.mark.parametrize("name", ["send", "receive", "close"])
def test_they_are_the_words_of_the_waiting_ones(name: str) -> None:
    promised = inspect.signature(getattr(Transport, name))
    given = inspect.signature(getattr(AsyncTransport, name))
    assert list(given.parameters) == list(promised.parameters)
