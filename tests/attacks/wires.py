"""The wire format, written once more: what an attacker sends, with nothing that would stop it.

Messages are made from a client's ``manifest.json`` alone, and none of splitonnx's own checks lies
in between.
"""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

Arrays = Mapping[str, np.ndarray]

PATIENCE = 60.0
"""Seconds after which an answer is given up."""
DTYPES = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "I32": np.int32, "U8": np.uint8}
_NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}


class Gone(Exception):
    """The connection ended without an answer."""


def encode(facts: Mapping[str, object], tensors: Arrays | None = None) -> bytes:
    """Write a message, whatever it says."""
    header: dict[str, object] = {"__metadata__": {"splitonnx": json.dumps(facts)}}
    body = b""
    for name, array in sorted((tensors or {}).items(), key=lambda item: -item[1].itemsize):
        start, body = len(body), body + array.tobytes()
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, len(body)],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return struct.pack("<Q", len(text)) + text + body


def decode(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a message of an honest server."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    facts: dict[str, Any] = json.loads(header.pop("__metadata__")["splitonnx"])
    tensors = {
        name: np.frombuffer(
            data[entry["data_offsets"][0] : entry["data_offsets"][1]], DTYPES[entry["dtype"]]
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }
    return facts, tensors


class Line:
    """A connection to a server that says what it likes; ``wires`` lists the bundle's by phase."""

    def __init__(self, url: str, client: Path, token: str | None = None) -> None:
        self.manifest = json.loads((client / "manifest.json").read_text())
        self.wires = {
            phase["name"]: phase["wires"]
            for phase in self.manifest["phases"]
            if phase.get("wires") and phase["name"] not in ("accumulate", "update")
        }
        self.session = uuid.uuid4().hex
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._open = ExitStack()
        opening = connect(
            url,
            additional_headers=headers,
            compression=None,
            max_size=None,
            ping_interval=None,
            proxy=None,
            close_timeout=1,
        )
        self._socket = self._open.enter_context(opening)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._open.close()

    def names(self, phase: str, sender: str, kind: str | None = None) -> list[str]:
        """List the wires that a party sends in a phase."""
        return [
            wire["tensor"]["name"]
            for wire in self.wires[phase]
            if wire["sender"] == sender and kind in (None, wire["kind"])
        ]

    def send(self, facts: Mapping[str, object], tensors: Arrays | None = None) -> None:
        """Send one message."""
        try:
            self._socket.send(encode(facts, tensors))
        except ConnectionClosed as closed:
            raise Gone(str(closed)) from closed

    def receive(self, patience: float = PATIENCE) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Wait for one message.

        Raises:
            Gone: there is none any more.
            TimeoutError: none came.
        """
        try:
            content = self._socket.recv(timeout=patience)
        except ConnectionClosed as closed:
            raise Gone(str(closed)) from closed
        assert isinstance(content, bytes)
        return decode(content)

    def ask(
        self,
        facts: Mapping[str, object],
        tensors: Arrays | None = None,
        *,
        patience: float = PATIENCE,
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Send a message and wait for the first answer to it."""
        self.send(facts, tensors)
        return self.receive(patience)

    def hello(self, **changes: object) -> dict[str, Any]:
        """Greet; the named fields are changed."""
        return self.ask(self.greeting(**changes))[0]

    def greeting(self, **changes: object) -> dict[str, object]:
        """Write a greeting; the named fields are changed."""
        return {
            "type": "Hello",
            "digest": self.manifest["digest"],
            "session": self.session,
            "step": 0,
            "wires": self.wires,
            **changes,
        }

    def task(self, **changes: object) -> dict[str, object]:
        """Write a task's first message; the named fields are changed."""
        return {
            "type": "Tensors",
            "session": self.session,
            "phase": "train",
            "step": 0,
            "micro_batch": 0,
            "turn": 0,
            "seed": 0,
            "learning_rate": 1e-3,
            **changes,
        }

    def save(self, step: int, *, publish: bool = True) -> dict[str, Any]:
        """Ask the server to save, and give its answer."""
        facts = {"type": "Save", "session": self.session, "step": step, "publish": publish}
        return self.ask(facts)[0]

    def leave(self) -> None:
        """Say goodbye, and wait until the server has hung up."""
        self.send({"type": "Bye"})
        try:
            while True:
                self.receive()
        except Gone:
            pass


def describe(answer: Mapping[str, Any]) -> str:
    """Tell an answer in a word."""
    return str(answer["code"] if answer["type"] == "Fault" else answer["type"])
