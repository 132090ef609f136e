from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from splitonnx.errors import ConnectionLost
from splitonnx.runtime.channels.websockets import connect

ATTEMPTS = 60
"""The error that came through was one of timing, in one attempt of ten."""


@contextmanager
def listening(answer: bytes, *, reset: bool) -> Iterator[str]:
    """Hang up on every caller, in the middle of an answer, while the context lasts."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            while not over.is_set():
                caller, _ = listener.accept()
                if reset:
                    linger = struct.pack("ii", 1, 0)
                    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                if not over.is_set():
                    caller.sendall(answer)
                caller.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            socket.create_connection(listener.getsockname()).close()  # the last caller
            thread.join()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 101 Sw"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_server_that_hangs_up_in_the_handshake_is_a_lost_connection(
    answer: bytes, reset: bool
) -> None:
    with listening(answer, reset=reset) as url:
        for _ in range(ATTEMPTS):
            with pytest.raises(ConnectionLost):
                connect(url)
