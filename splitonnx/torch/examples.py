"""The example with which a network is exported: the inputs of one call, and their names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitonnx.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Example:
    """The inputs of one call of a network.

    ``tensors`` maps the names of the parameters of ``forward`` to the inputs.  The inputs are
    passed by keyword if ``is_named`` is true, and by position otherwise.
    """

    tensors: Mapping[str, Any]
    is_named: bool

    @property
    def batch(self) -> int:
        """Return the number of samples."""
        return int(next(iter(self.tensors.values())).shape[0])

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return the inputs that are passed by position."""
        return () if self.is_named else tuple(self.tensors.values())

    @property
    def keywords(self) -> dict[str, Any]:
        """Return the inputs that are passed by keyword."""
        return dict(self.tensors) if self.is_named else {}

    def resize(self, batch: int) -> Example:
        """Return an example with ``batch`` samples.

        The samples of this example are used in reverse order, and repeated if there are too few.
        """
        order = [(self.batch - 1 - at) % self.batch for at in range(batch)]
        tensors = {name: tensor[order] for name, tensor in self.tensors.items()}
        return Example(tensors=tensors, is_named=self.is_named)


def read_example(torch: Any, model: Any, example: Any) -> Example:
    """Convert the example that the user gave to an :class:`Example`.

    ``example`` is a tensor, a tuple of tensors, or a dictionary from the names of the parameters of
    ``forward`` to tensors.  A single sample is repeated, because exporters write sizes of 1 into
    the model as constants.

    Raises:
        UsageError: the example does not consist of tensors with the same number of samples.
    """
    is_named = isinstance(example, Mapping)
    given = dict(example) if is_named else example
    if not is_named:
        values = (given,) if isinstance(given, torch.Tensor) else given
        if not isinstance(values, tuple | list):
            raise UsageError(
                "the example should be a tensor, a tuple of tensors, or a dictionary of tensors "
                f"by the names of forward's parameters, not {type(example).__name__}"
            )
        given = dict(zip(_name(model, len(values)), values, strict=True))
    else:
        known = list(inspect.signature(model.forward).parameters)
        order = {name: at for at, name in enumerate(known)}
        given = dict(sorted(given.items(), key=lambda item: order.get(str(item[0]), len(order))))
    _check(torch, given)
    read = Example(tensors=given, is_named=is_named)
    return read.resize(2) if read.batch == 1 else read


def _name(model: Any, count: int) -> list[str]:
    """Name the first ``count`` positional inputs by the parameters of ``forward``."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{at}" for at in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    if len(names) < count:
        raise UsageError(f"the example has {count} inputs, but forward takes {len(names)}")
    return names[:count]


def _check(torch: Any, given: Mapping[str, Any]) -> None:
    if not given:
        raise UsageError("the example has no inputs")
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(
                f"input '{name}' of the example should be a tensor, not {type(value).__name__}; "
                "give the network a forward that takes tensors alone"
            )
    counts = {name: tuple(value.shape)[:1] for name, value in given.items()}
    if len(set(counts.values())) > 1 or () in counts.values() or (0,) in counts.values():
        found = ", ".join(f"'{name}' {list(value.shape)}" for name, value in given.items())
        raise UsageError(
            "the first axis of each input should be the batch, with the same number of samples, "
            f"but the shapes are {found}; set other inputs within the network"
        )
