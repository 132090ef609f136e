"""``python tests/attacks/honest.py FOLDER URL TOKEN``: train in peace until stdin ends.

It writes ``FOLDER/honest.npz``: the client's weights, and the seconds of each step.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH, SAMPLES, SIDE = 32, 96, 24
"""A step of some ten milliseconds, beside which a scheduler's are small."""
PAUSE = 0.01
"""Seconds between two steps, which leave the attackers their share."""


def make_batch(step: int) -> dict[str, np.ndarray]:
    """Make the data of a step, for the model of pictures."""
    random = np.random.default_rng(step % (SAMPLES // BATCH))
    return {
        "x": random.standard_normal((BATCH, 2, SIDE, SIDE), np.float32),
        "labels": random.integers(0, 3, BATCH),
    }


def main() -> int:
    """Train until stdin ends."""
    from splitonnx import Client

    try:
        from splitonnx.runtime.channels.credentials import Credentials
    except ModuleNotFoundError:  # where 0.1.0 has it
        from splitonnx.runtime.credentials import Credentials  # type: ignore[import-not-found, no-redef]

    folder, url, token = sys.argv[1:]
    over = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    seconds: list[float] = []
    credentials = Credentials(token=token)
    with Client(
        Path(folder, "bundle", "client"), url, credentials=credentials, threads=1
    ) as client:
        gc.collect()
        gc.freeze()  # as the command does, so that a pause of its own is not taken for another's
        while not over.wait(PAUSE):
            batch = make_batch(len(seconds))
            begun = time.perf_counter()
            client.step(batch)
            seconds.append(time.perf_counter() - begun)
            if len(seconds) == 1:
                print("begun", flush=True)
        found: dict[str, Any] = {f"weight {name}": a for name, a in client.state().items()}
        np.savez(Path(folder, "honest.npz"), **found, seconds=np.array(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
