"""Read the tensors of a network, change its modes, and restore its state after an export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names of a network's tensors, by purpose.

    ``groups`` maps each name to all names of the same tensor; a tied weight has several.
    ``parameters`` are the names of the parameters, and ``learnt`` are the names of the parameters
    that require a gradient.  ``buffers`` are the names of the buffers, and ``statistics`` are the
    names of the running means and variances of BatchNormalization.
    """

    groups: Mapping[str, tuple[str, ...]]
    parameters: frozenset[str]
    buffers: frozenset[str]
    learnt: frozenset[str]
    statistics: frozenset[str]


def read_layout(model: Any) -> Layout:
    """Read the names of a network's parameters and buffers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    same: dict[int, list[str]] = {}
    for name, tensor in (parameters | buffers).items():
        same.setdefault(id(tensor), []).append(name)
    return Layout(
        groups={name: tuple(same[id(t)]) for name, t in (parameters | buffers).items()},
        parameters=frozenset(parameters),
        buffers=frozenset(buffers),
        learnt=frozenset(name for name, tensor in parameters.items() if tensor.requires_grad),
        statistics=frozenset(
            name for name in buffers if name.rpartition(".")[2] in ("running_mean", "running_var")
        ),
    )


def read_arrays(model: Any) -> dict[str, np.ndarray]:
    """Return copies of a network's parameters and buffers, each under all of its names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name: to_array(tensor) for name, tensor in (parameters | buffers).items()}


def to_array(tensor: Any) -> np.ndarray:
    """Copy a tensor to an array; bfloat16, which numpy does not have, becomes float32."""
    plain = tensor.detach().cpu()
    if str(plain.dtype) == "torch.bfloat16":
        plain = plain.float()
    array: np.ndarray = np.array(plain.numpy())
    return array


def list_outputs(result: Any) -> list[tuple[str, Any]]:
    """List the tensors that a network returns, with their names.

    The names are the keys of the dictionary that the network returns, or ``output_0``, ``output_1``
    and so on for a sequence.  A single tensor is named ``output``.  If an entry consists of several
    tensors, a number is added to the name of each, as in ``output_0_1``.
    """
    if hasattr(result, "shape"):
        return [("output", result)]
    items = result.items() if isinstance(result, Mapping) else enumerate(result or ())
    found = []
    for key, value in items:
        label = key if isinstance(key, str) else f"output_{key}"
        inner = [] if value is None else list_outputs(value)
        found += [
            (label if len(inner) == 1 else f"{label}_{n}", t) for n, (_, t) in enumerate(inner)
        ]
    return found


@contextmanager
def keeping_state(torch: Any, model: Any) -> Iterator[None]:
    """Restore a network's modes and buffers, and PyTorch's random state, after a ``with`` block.

    Buffers must be restored because each call in training mode updates the running statistics.
    Exporters also call the network.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, tensor, None if tensor is None else tensor.detach().clone())
        for module in model.modules()
        for name, tensor in module._buffers.items()
    ]
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, tensor, copy in buffers:
                module._buffers[name] = tensor
                if tensor is not None:
                    tensor.copy_(copy)


@contextmanager
def without_dropout(torch: Any, model: Any) -> Iterator[None]:
    """Turn off dropout in PyTorch's own modules during a ``with`` block, but keep their modes."""
    changed: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        is_dropout = isinstance(module, torch.nn.modules.dropout._DropoutNd)
        is_layer = isinstance(module, torch.nn.RNNBase | torch.nn.MultiheadAttention)
        for name in [*(["p"] if is_dropout else []), *(["dropout"] if is_layer else [])]:
            changed.append((module, name, getattr(module, name)))
            setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def start_training(model: Any) -> None:
    """Switch a network to training mode if it is in eval mode.

    If the network is in training mode already, nothing changes; modules that the user has put into
    eval mode stay in eval mode.
    """
    if not model.training:
        model.train()
