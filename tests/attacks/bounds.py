"""F8: models of some hundred bytes that keep ``check``, ``inspect`` and ``cut`` busy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import onnx

from tests.attacks.models import (
    build_loop,
    build_plain,
    build_polynomials,
    build_recurrence,
    save,
)
from tests.attacks.verdicts import Attack, Ground, Outcome

SECONDS = 30.0
"""Within which each command has to end."""


def try_commands(build: Callable[[], onnx.ModelProto], ground: Ground) -> Outcome:
    """Check, inspect and cut a model, each within its bound."""
    folder = ground.room()
    model = save(build(), folder)
    seen, held = [], True
    for command, *options in (
        ("check",), ("inspect",), ("cut", "--at", "first", "--send-labels", "-o", folder / "bundle")
    ):  # fmt: skip
        ended = ground.checkout.run(command, model, *options, seconds=SECONDS)
        how = f"{ended.how} after {ended.seconds:.1f} s" if ended.code is not None else ended.how
        seen.append(f"{command}: {how}")
        held = held and ended.code in (0, 1, 2) and "Traceback" not in ended.printed
    return Outcome(seen="; ".join(seen), held=held)


def _attack(name: str, build: Callable[[], onnx.ModelProto]) -> Attack:
    return Attack(
        fault="F8",
        name=name,
        right=f"each command ends within {SECONDS:.0f} s",
        run=partial(try_commands, build),
    )


ATTACKS = (
    _attack("25 nodes of symbolic polynomials", build_polynomials),
    _attack("a Loop of 1,000 trips", build_loop),
    _attack("20,000 plain nodes", partial(build_plain, 20_000)),
    _attack("an LSTM of 10,000 constant steps", build_recurrence),
)
