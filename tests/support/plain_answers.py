"""A program that answers plain HTTP requests as a test says, true or not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer


@dataclass(frozen=True, kw_only=True)
class PlainAnswer:
    """An answer; ``headers`` replace the length of the content, too."""

    content: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Asked = list[tuple[str, str | None]]
"""Paths and tokens of the requests."""


@contextmanager
def answering(make: Callable[[str], PlainAnswer]) -> Iterator[tuple[str, Asked]]:
    """Answer each path with what ``make`` returns; yield the address, and what was asked."""
    asked: Asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            answer = make(self.path)
            self.send_response(answer.status)
            length = {"Content-Length": str(len(answer.content))}
            for name, value in {**length, **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()
