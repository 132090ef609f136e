"""The one interface of every way from a client to its server."""

from __future__ import annotations

import inspect

import pytest

from splitonnx.runtime.channels.websockets import WebSocketTransport
from splitonnx.runtime.memory import MemoryTransport
from splitonnx.runtime.wire.transports import Transport
from tests.support.networks import Line


@pytest.mark.parametrize("kind", [WebSocketTransport, MemoryTransport, Line])
@pytest.mark.parametrize("name", ["send", "receive", "close"])
def test_every_way_is_used_in_the_same_words(kind: type, name: str) -> None:
    promised = inspect.signature(getattr(Transport, name))
    given = inspect.signature(getattr(kind, name))
    assert list(given.parameters) == list(promised.parameters)


def test_it_counts_what_it_carries_and_promises_nothing_else() -> None:
    counts = {"bytes_sent", "bytes_received"}
    methods = {name for name in vars(Transport) if not name.startswith("_")}
    assert methods == {"send", "receive", "close"} | counts
    assert all(isinstance(vars(Transport)[name], property) for name in counts)
