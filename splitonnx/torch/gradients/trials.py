"""Compute a network's gradients at points near its parameters and its example.

:mod:`agreements` compares these gradients with those of the exported model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from splitonnx.torch.examples import Example
from splitonnx.torch.networks import list_outputs, to_array, without_dropout
from splitonnx.torch.observations import call

_SEEDS = (1, 2)
_SHARE, _LEAST = 0.1, 0.02
"""Numbers are moved by this share of their root mean square, and by at least so much."""
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The gradients of a network at one point.

    ``inputs`` and ``values`` are the inputs and the parameters at this point.  ``gradients`` maps
    the name of each parameter to its gradient.  The gradients are those of the sum of all outputs
    times ``directions``, which holds random numbers for each output.  ``noise`` is the largest
    change of each gradient if the samples are reversed and the inputs change by about a rounding
    error.  ``is_training`` means that the network was in the modes in which it is trained.
    """

    inputs: Mapping[str, np.ndarray]
    values: Mapping[str, np.ndarray]
    directions: Mapping[str, np.ndarray]
    gradients: Mapping[str, np.ndarray]
    noise: Mapping[str, float]
    is_training: bool


def list_trials(torch: Any, network: Any, example: Example, outputs: Sequence[str]) -> list[Trial]:
    """Compute a network's gradients, without dropout, at two points near the given one.

    The given point consists of the network's parameters and the example.  A point is omitted if the
    network fails there or if a gradient is not finite.  If both points are omitted, the given point
    is used instead.  If the results are random even without dropout, the network is first switched
    to eval mode; otherwise its modes are not changed.  ``outputs`` are the names of the network's
    outputs.
    """
    with without_dropout(torch, network):
        first, second = (call(torch, network, example) for _ in range(2))
        is_training = all(np.array_equal(first[n], second[n], equal_nan=True) for n in first)
        if not is_training:
            network.eval()
        kinds = [*((seed, _SHARE) for seed in _SEEDS), (_SEEDS[0], 0.0)]
        found: list[Trial] = []
        for seed, share in kinds:
            if share or not found:
                draw = torch.Generator().manual_seed(seed)
                trial = _try(torch, network, example, outputs, draw, share, is_training)
                found += [] if trial is None else [trial]
    return found


def _try(
    torch: Any,
    network: Any,
    example: Example,
    outputs: Sequence[str],
    draw: Any,
    share: float,
    is_training: bool,
) -> Trial | None:
    """Compute the gradients at one point, or return ``None`` if this is not possible."""
    moved = Example(
        tensors={name: _move(torch, t, draw, share) for name, t in example.tensors.items()},
        is_named=example.is_named,
    )
    with _moving_parameters(torch, network, draw, share):
        try:
            directions = _draw_directions(torch, network, moved, outputs, draw)
            gradients = _differentiate(torch, network, moved, directions, outputs)
            turned = {n: r[::-1].copy() if r.ndim else r for n, r in directions.items()}
            others = _differentiate(torch, network, _round(moved), turned, outputs)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError):
            return None  # the moved numbers are not in the network's domain
        values = {n: to_array(p) for n, p in network.named_parameters() if n in gradients}
    if not gradients or not all(np.isfinite(g).all() for g in gradients.values()):
        return None
    gaps = {n: float(np.abs(g - others[n]).max(initial=0)) for n, g in gradients.items()}
    return Trial(
        inputs={name: tensor.detach().cpu().numpy() for name, tensor in moved.tensors.items()},
        values=values,
        directions=directions,
        gradients=gradients,
        noise=gaps,
        is_training=is_training,
    )


def _round(example: Example) -> Example:
    """Reverse the order of the samples, and change float inputs about as much as rounding does."""
    turned = example.resize(example.batch)
    return Example(
        tensors={
            name: tensor * (1 + _ROUNDING) if tensor.is_floating_point() else tensor
            for name, tensor in turned.tensors.items()
        },
        is_named=example.is_named,
    )


def _draw_directions(
    torch: Any, network: Any, example: Example, outputs: Sequence[str], draw: Any
) -> dict[str, np.ndarray]:
    """Draw numbers in the shape of each output that has a gradient."""
    with torch.enable_grad():
        listed = list_outputs(network(*example.arguments, **example.keywords))
    return {
        name: torch.randn(tuple(tensor.shape), generator=draw).numpy()
        for name, (_, tensor) in zip(outputs, listed, strict=True)
        if tensor.requires_grad and tensor.is_floating_point()
    }


def _differentiate(
    torch: Any,
    network: Any,
    example: Example,
    directions: Mapping[str, np.ndarray],
    outputs: Sequence[str],
) -> dict[str, np.ndarray]:
    """Return the gradient of each parameter of the sum of the outputs times ``directions``."""
    wanted = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not wanted or not directions:
        return {}
    with torch.enable_grad():
        listed = list_outputs(network(*example.arguments, **example.keywords))
        made = {name: tensor for name, (_, tensor) in zip(outputs, listed, strict=True)}
        terms = [
            (made[name].float() * torch.from_numpy(array).to(made[name].device)).sum()
            for name, array in directions.items()
        ]
        found = torch.autograd.grad(sum(terms), list(wanted.values()), allow_unused=True)
    return {
        name: to_array(torch.zeros_like(p) if gradient is None else gradient)
        for (name, p), gradient in zip(wanted.items(), found, strict=True)
    }


@contextmanager
def _moving_parameters(torch: Any, network: Any, draw: Any, share: float) -> Iterator[None]:
    """Move the parameters that require a gradient in a ``with`` block, and put them back."""
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in wanted]
    try:
        with torch.no_grad():
            for parameter in wanted:
                parameter.copy_(_move(torch, parameter, draw, share))
        yield
    finally:
        with torch.no_grad():
            for parameter, tensor in zip(wanted, kept, strict=True):
                parameter.copy_(tensor)


def _move(torch: Any, tensor: Any, draw: Any, share: float) -> Any:
    """Add random numbers to a float tensor; other tensors stay as they are."""
    if not share or not tensor.is_floating_point() or not tensor.numel():
        return tensor
    plain = tensor.detach()
    size = plain.float().square().mean().sqrt().item()
    if not np.isfinite(size):
        return tensor
    noise = torch.randn(tuple(plain.shape), generator=draw).to(plain.device, plain.dtype)
    return plain + noise * (share * size + _LEAST)
