"""Several clients train one model with a real server, and the unsplit model by hand."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.servers import Server

SIZES = (4, 8, 6)
"""Samples of each client; all in one batch."""


def split(data: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    ends = np.cumsum(SIZES)
    return [
        {name: array[end - size : end] for name, array in data.items()}
        for size, end in zip(SIZES, ends, strict=True)
    ]


def train_together(
    bundle: Bundle,
    parts: Sequence[Mapping[str, np.ndarray]],
    options: PolicyOptions,
    epochs: int,
    *,
    accumulate: Sequence[int] = (),
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Train one client per part of the data; return the states of the clients and the copies.

    ``accumulate`` says how many micro-batches each client's step has.
    """
    states: dict[int, dict[str, np.ndarray]] = {}
    errors: list[Exception] = []
    copies: dict[int, dict[str, np.ndarray]] = {}
    assert bundle.server is not None
    with Server(bundle.server, port=0, threads=1, policy=options) as server:

        def train(number: int) -> None:
            try:
                run(number)
            except Exception as error:  # noqa: BLE001 - raised by the caller
                errors.append(error)

        def run(number: int) -> None:
            data = parts[number]
            size = len(next(iter(data.values())))
            with Client(bundle.client, server.url, threads=1, share=True) as client:
                count = accumulate[number] if accumulate else 1
                client.fit(data, epochs=epochs, batch_size=size, shuffle=False, accumulate=count)
                model = server._registry.policy.models[client.session]  # type: ignore[attr-defined]
                states[number] = client.state()
                copies[number] = model.executor.state()

        threads = [threading.Thread(target=train, args=(n,)) for n in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        assert server._registry.policy.report().late == 0
    return [states[n] for n in range(len(parts))], [copies[n] for n in range(len(parts))]


def step_alone(
    bundle: Bundle, state: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the weights after one step of the unsplit model from ``state``."""
    weights = {n: state[n] for n in bundle.client.weights}
    whole = PartyBundle(
        manifest=bundle.client.manifest, graphs=bundle.client.graphs, weights=weights
    )
    with Client(whole, threads=1) as client:
        client.step(data)
        return client.state()


def average(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of arrays, weighted by the clients' numbers of samples."""
    weights = np.array(SIZES) / sum(SIZES)
    return np.tensordot(weights, np.stack(arrays).astype(np.float64), 1).astype(np.float32)
