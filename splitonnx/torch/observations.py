"""Call a network, and observe which parameters and layers it uses and whether it is random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from splitonnx.torch.examples import Example
from splitonnx.torch.networks import list_outputs, to_array


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What was observed while a network ran in training mode.

    ``unused`` are the names of the parameters that get no gradient from the outputs.  ``training``
    maps the name of the running mean of each BatchNormalization in training mode to its momentum.
    ``frozen`` are the names of the running means of BatchNormalizations in eval mode.  ``dropouts``
    is the number of times that PyTorch's own modules apply dropout.  ``recurrent_dropout`` means
    that a recurrent module applies dropout between its layers.  ``is_random`` means that two calls
    return different results.
    """

    unused: frozenset[str]
    training: Mapping[str, float | None]
    frozen: frozenset[str]
    dropouts: int
    recurrent_dropout: bool
    is_random: bool


def call(torch: Any, model: Any, example: Example) -> dict[str, np.ndarray]:
    """Call a network without changing the modes of its modules, and return its outputs by name."""
    with torch.no_grad():
        result = model(*example.arguments, **example.keywords)
    return {name: to_array(tensor) for name, tensor in list_outputs(result)}


def observe(torch: Any, model: Any, example: Example) -> Observation:
    """Call a network several times, without changing its modes, and return what was observed."""
    norms: dict[bool, dict[str, float | None]] = {True: {}, False: {}}
    dropouts: list[int] = []
    handles = []
    for name, module in model.named_modules():
        watch = _watch(torch, name, module, norms, dropouts)
        if watch is not None:
            handles.append(module.register_forward_hook(watch))
    try:
        with torch.enable_grad():
            result = model(*example.arguments, **example.keywords)
    finally:
        for handle in handles:
            handle.remove()
    first, second = (call(torch, model, example) for _ in range(2))
    return Observation(
        unused=_find_unused(torch, model, result),
        training=norms[True],
        frozen=frozenset(norms[False]),
        dropouts=sum(dropouts),
        recurrent_dropout=any(
            _drops(m) for m in model.modules() if isinstance(m, torch.nn.RNNBase)
        ),
        is_random=any(not np.array_equal(first[n], second[n], equal_nan=True) for n in first),
    )


def _watch(
    torch: Any,
    name: str,
    module: Any,
    norms: dict[bool, dict[str, float | None]],
    dropouts: list[int],
) -> Callable[..., None] | None:
    """Return a hook that notes a BatchNormalization or a dropout, or ``None`` for other modules."""
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        if module.running_mean is None:
            return None
        mean = f"{name}.running_mean" if name else "running_mean"
        return lambda module, *_: norms[module.training].update({mean: module.momentum})
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return lambda module, *_: dropouts.append(int(module.training and module.p > 0))
    if isinstance(module, torch.nn.RNNBase):
        return lambda module, *_: dropouts.append((module.num_layers - 1) * _drops(module))
    return None


def _drops(module: Any) -> bool:
    """Return whether a recurrent module applies dropout between its layers."""
    return bool(module.training and module.dropout > 0 and module.num_layers > 1)


def _find_unused(torch: Any, model: Any, result: Any) -> frozenset[str]:
    """Find the parameters that get no gradient from any output."""
    wanted = {name: t for name, t in model.named_parameters() if t.requires_grad}
    outputs = [tensor for _, tensor in list_outputs(result) if tensor.requires_grad]
    if not wanted:
        return frozenset()
    if not outputs:
        return frozenset(wanted)
    total = sum(tensor.float().sum() for tensor in outputs)
    gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return frozenset(n for n, g in zip(wanted, gradients, strict=True) if g is None)
