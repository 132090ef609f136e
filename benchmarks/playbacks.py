"""A server's messages, recorded while it trains, and played back to other clients of its bundle.

A device has a server neither on its processor nor in its memory.  Where a benchmark has both on one
machine, the server's work moves the client's times; played back, the same messages come from a
process that computes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import msgspec
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

from splitonnx.messages import Hello, Tensors, Welcome, decode_message, encode_message


@contextmanager
def recording(upstream: str) -> Iterator[tuple[str, list[bytes]]]:
    """Pass one client's messages on to a server; give the address and the server's replies.

    Every message of a U-shaped training step has one reply, and so has the greeting.
    """
    replies: list[bytes] = []
    with _serving(partial(_record, upstream, replies)) as url:
        yield url, replies


@contextmanager
def playing(replies: Sequence[bytes]) -> Iterator[str]:
    """Serve any number of clients with a recording's replies, each in its own session's name."""
    with _serving(partial(_play, replies)) as url:
        yield url


def _record(upstream: str, replies: list[bytes], client: ServerConnection) -> None:
    with connect(upstream, compression=None, max_size=None) as server:
        try:
            for content in client:
                server.send(content)
                reply = server.recv(decode=False)
                replies.append(reply)
                client.send(reply)
        except ConnectionClosed:
            return  # it was told good-bye


def _play(replies: Sequence[bytes], client: ServerConnection) -> None:
    hello, _ = decode_message(client.recv(decode=False))
    assert isinstance(hello, Hello)
    own = [_rename(reply, hello.session) for reply in replies]
    client.send(own[0])
    for _, reply in zip(client, own[1:], strict=False):
        client.send(reply)
    client.close()


def _rename(reply: bytes, session: str) -> bytes:
    """Put a message into another session's name."""
    message, tensors = decode_message(reply)
    assert isinstance(message, Welcome | Tensors)
    return b"".join(encode_message(msgspec.structs.replace(message, session=session), tensors))


@contextmanager
def _serving(handle: Callable[[ServerConnection], None]) -> Iterator[str]:
    with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()
