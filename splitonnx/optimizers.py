"""Optimizers, described by their kind and hyperparameters; this module computes nothing.

Semantics and defaults are those of torch.optim, so that settings can be copied from PyTorch.  Like
torch's parameter groups, ``groups`` have a learning rate and weight decay of their own; the last
group that matches a parameter applies.
Gradient clipping (``clip_norm``) uses the global norm over all parameters of all parties, as
``torch.nn.utils.clip_grad_norm_`` does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TypeAlias

from splitonnx.errors import UsageError, list_some

Settings: TypeAlias = dict[str, float | str | None]
"""The settings of an optimizer or of a parameter group, by name."""
Description: TypeAlias = dict[str, float | str | list[Settings] | None]
"""An optimizer's kind and settings; those of its parameter groups are a list under ``groups``."""


def _check(name: str, value: float, *, lower: float, upper: float | None = None) -> None:
    if not lower <= value < (math.inf if upper is None else upper):
        limit = "finite" if upper is None else f"below {upper:g}"
        allowed = f"at least {lower:g} and {limit}"
        raise UsageError(f"{name} must be {allowed}, not {value:g}")


def _check_clip(clip_norm: float | None) -> None:
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise UsageError(f"clip_norm must be above 0 and finite, not {clip_norm:g}")


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """The parameters whose name ``pattern`` finds (``re.search``), and how they are updated.

    Their learning rate is the optimizer's, multiplied by ``lr_factor``.  ``weight_decay`` replaces
    the optimizer's; ``None`` keeps it.
    """

    pattern: str
    lr_factor: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UsageError(
                f"the pattern '{self.pattern}' of a parameter group is not a regular expression: "
                f"{error}"
            ) from error
        _check("lr_factor", self.lr_factor, lower=0)
        if self.weight_decay is not None:
            _check("weight_decay", self.weight_decay, lower=0)


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
    groups: Sequence[ParameterGroup] = ()

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
    groups: Sequence[ParameterGroup] = ()

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


def describe_optimizer(optimizer: Optimizer) -> Description:
    """Convert an optimizer to a dictionary of its settings; the key ``name`` contains its kind."""
    settings = {key: value for key, value in asdict(optimizer).items() if key != "groups"}
    described: Description = {"name": type(optimizer).__name__.lower(), **settings}
    if optimizer.groups:
        described["groups"] = [asdict(group) for group in optimizer.groups]
    return described


def read_optimizer(
    description: Mapping[str, float | str | Sequence[Mapping[str, float | str | None]] | None],
) -> Optimizer:
    """Build an optimizer from a dictionary of settings; missing settings get their defaults.

    Raises:
        UsageError: the optimizer or a setting is unknown, or a value is out of range.
    """
    name = description.get("name")
    kind = _KINDS.get(str(name))
    if kind is None:
        raise UsageError(f"there is no optimizer '{name}'; choose from {', '.join(_KINDS)}")
    settings = {key: value for key, value in description.items() if key not in ("name", "groups")}
    known = [field.name for field in fields(kind) if field.name != "groups"]
    _check_known(str(name), settings, known)
    groups = tuple(map(_read_group, description.get("groups") or ()))  # type: ignore[arg-type]
    return kind(**settings, groups=groups)  # type: ignore[arg-type]  # values by the class


def _read_group(settings: Mapping[str, float | str | None]) -> ParameterGroup:
    _check_known("a parameter group", settings, [field.name for field in fields(ParameterGroup)])
    return ParameterGroup(**settings)  # type: ignore[arg-type]  # values by the class


def _check_known(owner: str, settings: Collection[str], known: Sequence[str]) -> None:
    for key in settings:
        if key not in known:
            raise UsageError(f"{owner} has no setting '{key}'; it has {', '.join(known)}")


def assign_groups(
    groups: Sequence[ParameterGroup], parameters: Collection[str]
) -> dict[str, ParameterGroup]:
    """Map each parameter that is in a group to its group, the last one that matches its name.

    Raises:
        UsageError: a group has no parameter.
    """
    assigned: dict[str, ParameterGroup] = {}
    for group in groups:
        found = [name for name in parameters if re.search(group.pattern, name)]
        if not found:
            raise UsageError(
                f"--param-group {group.pattern}: it finds no parameter that is trained; those are "
                f"{list_some(list(parameters))}"
            )
        assigned |= dict.fromkeys(found, group)
    for group in groups:
        if not any(one is group for one in assigned.values()):
            raise UsageError(
                f"--param-group {group.pattern} has no effect: later groups have all parameters "
                "that it finds; put it behind them, or leave it out"
            )
    return assigned
