"""Split learning on ONNX: cut a model into two parts and train them on different machines.

Training the parts gives the same result as training the uncut model.  The names below are imported
when they are first used.  Therefore ``import splitonnx`` is fast, and a device that only trains
does not need ``onnx``::

    from splitonnx import AdamW, Client, Server, cut, merge, verify
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splitonnx import torch as torch
    from splitonnx.bundles import Bundle
    from splitonnx.errors import SplitonnxError
    from splitonnx.losses import Loss
    from splitonnx.optimizers import SGD, Adam, AdamW, ParameterGroup
    from splitonnx.partitioner.adaptations import adapt, write_adapted
    from splitonnx.partitioner.merges import merge, write_adapters, write_merged
    from splitonnx.partitioner.permissions import cut
    from splitonnx.partitioner.reports.checks import check
    from splitonnx.partitioner.reports.inspections import inspect
    from splitonnx.partitioner.reports.u_shapes.pairs import inspect_pairs
    from splitonnx.runtime.channels.queries.server_parts import collect
    from splitonnx.runtime.client.asynchronous.clients import AsyncClient
    from splitonnx.runtime.client.clients import Client
    from splitonnx.runtime.client.explanations import explain
    from splitonnx.runtime.client.histories import History
    from splitonnx.runtime.engine.exports import export
    from splitonnx.runtime.server.policies.policy_options import PolicyOptions
    from splitonnx.runtime.server.servers import Server
    from splitonnx.verifications import verify

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "AsyncClient",
    "Bundle",
    "Client",
    "History",
    "Loss",
    "ParameterGroup",
    "PolicyOptions",
    "Server",
    "SplitonnxError",
    "adapt",
    "check",
    "collect",
    "cut",
    "explain",
    "export",
    "inspect",
    "inspect_pairs",
    "merge",
    "verify",
    "write_adapted",
    "write_adapters",
    "write_merged",
]

_HOMES = {
    "SGD": "optimizers",
    "Adam": "optimizers",
    "AdamW": "optimizers",
    "AsyncClient": "runtime.client.asynchronous.clients",
    "Bundle": "bundles",
    "Client": "runtime.client.clients",
    "History": "runtime.client.histories",
    "Loss": "losses",
    "ParameterGroup": "optimizers",
    "PolicyOptions": "runtime.server.policies.policy_options",
    "Server": "runtime.server.servers",
    "SplitonnxError": "errors",
    "adapt": "partitioner.adaptations",
    "check": "partitioner.reports.checks",
    "collect": "runtime.channels.queries.server_parts",
    "cut": "partitioner.permissions",
    "explain": "runtime.client.explanations",
    "export": "runtime.engine.exports",
    "inspect": "partitioner.reports.inspections",
    "inspect_pairs": "partitioner.reports.u_shapes.pairs",
    "merge": "partitioner.merges",
    "verify": "verifications",
    "write_adapted": "partitioner.adaptations",
    "write_adapters": "partitioner.merges",
    "write_merged": "partitioner.merges",
}
"""The module that each name comes from."""


def __getattr__(name: str) -> object:
    if name == "torch":  # the room, which is imported by this, and not PyTorch
        return import_module("splitonnx.torch")
    if name not in _HOMES:
        raise AttributeError(f"module 'splitonnx' has no attribute '{name}'")
    from splitonnx.extras import load
    from splitonnx.imports import UNUSED, postponing

    with postponing(*UNUSED):
        value: object = getattr(load(f"splitonnx.{_HOMES[name]}", name), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
