"""What an attack is, and what is told of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.attacks.models import Cut, cut_digits
from tests.attacks.processes import Checkout


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was seen, with its own figures, and whether the product held."""

    seen: str
    held: bool


class Ground:
    """Where attacks take place: the code under attack, and room for files."""

    def __init__(self, checkout: Checkout, folder: Path) -> None:
        self.checkout = checkout
        self.folder = folder

    def room(self) -> Path:
        """Make a folder that nobody uses."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    @cached_property
    def digits(self) -> Cut:
        """The quickstart's bundle; take copies of it."""
        return cut_digits(self.checkout, self.room())


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One row of the table: ``fault`` is its number, ``right`` what the product has to do."""

    fault: str
    name: str
    right: str
    run: Callable[[Ground], Outcome]
