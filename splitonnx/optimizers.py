"""Optimizers, described by their kind and hyperparameters; this module computes nothing.

Semantics and defaults are those of torch.optim, so that settings can be copied from PyTorch.
Gradient clipping (``clip_norm``) uses the global norm over all parameters of all parties, as
``torch.nn.utils.clip_grad_norm_`` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from splitonnx.errors import UsageError


def _check(name: str, value: float, *, lower: float, upper: float | None = None) -> None:
    if not lower <= value < (math.inf if upper is None else upper):
        limit = "finite" if upper is None else f"below {upper:g}"
        allowed = f"at least {lower:g} and {limit}"
        raise UsageError(f"{name} must be {allowed}, not {value:g}")


def _check_clip(clip_norm: float | None) -> None:
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise UsageError(f"clip_norm must be above 0 and finite, not {clip_norm:g}")


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with optional momentum and weight decay.

    For each parameter ``p`` with the gradient ``g``, a step adds ``weight_decay * p`` to ``g``,
    computes the velocity ``v = momentum * v + g``, and updates the parameter: ``p -= lr * v``.
    """

    lr: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _check("lr", self.lr, lower=0)
        _check("momentum", self.momentum, lower=0, upper=1)
        _check("weight_decay", self.weight_decay, lower=0)
        _check_clip(self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class Adam:
    """The Adam optimizer (arXiv 1412.6980).

    Weight decay adds ``weight_decay * p`` to the gradient of each parameter ``p``.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _check("lr", self.lr, lower=0)
        _check("beta1", self.beta1, lower=0, upper=1)
        _check("beta2", self.beta2, lower=0, upper=1)
        _check("eps", self.eps, lower=0)
        _check("weight_decay", self.weight_decay, lower=0)
        _check_clip(self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """The AdamW optimizer (arXiv 1711.05101): Adam with decoupled weight decay.

    Weight decay does not change the gradient.  Instead, every step subtracts ``lr * weight_decay *
    p`` from each parameter ``p``.
    """

    weight_decay: float = 1e-2


Optimizer = SGD | Adam | AdamW

_KINDS: Mapping[str, type[SGD] | type[Adam]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}


def list_optimizers() -> list[str]:
    """List the names that ``--optimizer`` accepts."""
    return list(_KINDS)


def describe_optimizer(optimizer: Optimizer) -> dict[str, float | str | None]:
    """Convert an optimizer to a dictionary of its settings; the key ``name`` contains its kind."""
    return {"name": type(optimizer).__name__.lower(), **asdict(optimizer)}


def read_optimizer(description: Mapping[str, float | str | None]) -> Optimizer:
    """Build an optimizer from a dictionary of settings; missing settings get their defaults.

    Raises:
        UsageError: the optimizer or a setting is unknown, or a value is out of range.
    """
    name = description.get("name")
    kind = _KINDS.get(str(name))
    if kind is None:
        raise UsageError(f"there is no optimizer '{name}'; choose from {', '.join(_KINDS)}")
    settings = {key: value for key, value in description.items() if key != "name"}
    known = [field.name for field in fields(kind)]
    for key in settings:
        if key not in known:
            raise UsageError(f"{name} has no setting '{key}'; it has {', '.join(known)}")
    return kind(**settings)  # type: ignore[arg-type]  # keys are checked, values by the class
