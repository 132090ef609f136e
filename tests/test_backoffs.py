"""How long a client waits before it tries again, and which times make no sense."""

from __future__ import annotations

from itertools import islice
from math import inf, nan
from unittest.mock import patch

import pytest

from splitonnx.errors import UsageError
from splitonnx.runtime.backoffs import Backoff
from splitonnx.runtime.clients import Client
from tests import tiny
from tests.tiny_servers import TinyServer


def test_no_wait_is_longer_than_the_longest() -> None:
    with patch("splitonnx.runtime.backoffs.random.uniform", lambda lower, upper: upper):
        waits = list(islice(Backoff(first=3.0, longest=10.0).delays(), 5))
    assert waits == [0.0, 3.0, 6.0, 10.0, 10.0]


@pytest.mark.parametrize(("first", "longest"), [(0.0, 0.0), (2.0, 2.0), (0.05, inf)])
def test_a_first_wait_up_to_the_longest_is_taken(first: float, longest: float) -> None:
    assert all(
        wait <= longest for wait in islice(Backoff(first=first, longest=longest).delays(), 9)
    )


def test_a_first_wait_beyond_the_longest_is_refused() -> None:
    with pytest.raises(UsageError, match=r"not be longer than the longest \(5 s\), not 20 s"):
        Backoff(first=20.0, longest=5.0)
    with pytest.raises(UsageError, match="longer than the longest"):
        Backoff(first=20.0)  # with the default of the other


@pytest.mark.parametrize("name", ["first", "longest", "give_up_after"])
@pytest.mark.parametrize("seconds", [-1.0, -inf, nan])
def test_a_time_that_is_none_is_refused_by_its_name(name: str, seconds: float) -> None:
    times = {"first": 0.0} | {name: seconds}
    with pytest.raises(UsageError, match=f"{name} must be 0 seconds or more, not {seconds:g}"):
        Backoff(**times)


@pytest.mark.parametrize("seconds", [-1.0, nan])
def test_a_client_refuses_it_before_it_asks_a_server(seconds: float) -> None:
    server = TinyServer(bundle=tiny.split_bundle())
    with pytest.raises(UsageError, match="give_up_after must be 0 seconds or more"):
        Client(server.bundle.client, server.dial, give_up_after=seconds)
    assert server.heard == []
