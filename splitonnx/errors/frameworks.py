"""Errors in exporting a framework's network, or in loading trained weights back into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitonnx.errors.roots import SplitonnxError, flatten, quote

_FEW = 8


@dataclass(eq=False)
class NotExported(SplitonnxError):
    """No exporter of the framework can export a network for training.

    ``reasons`` maps the name of each exporter that was tried to the reason why it failed.
    """

    network: str
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {flatten(why)}" for name, why in self.reasons.items())
        return (
            f"{self.network} cannot be exported for training ({reasons}); change what the reason "
            "names, or export it by hand as docs/exporting.md says"
        )


@dataclass(eq=False)
class WrongExport(SplitonnxError):
    """An exported model differs from the given network; no file was written."""

    network: str
    what: str
    expected: str
    found: str
    advice: str = "export it by hand as docs/exporting.md says, or report this"

    def __str__(self) -> str:
        return (
            f"the export of {self.network} differs in {self.what}: it should be {self.expected}, "
            f"but is {self.found}; {self.advice}"
        )


@dataclass(eq=False)
class WeightsMismatch(SplitonnxError):
    """Trained weights do not fit a network; nothing was loaded.

    ``missing`` lists the network's tensors that have no trained tensor.  ``unexpected`` lists the
    trained tensors that the network does not have.  ``different`` contains a clause for each tensor
    with the wrong shape or value.
    """

    source: str
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    different: Sequence[str] = ()

    def __str__(self) -> str:
        clauses = [
            *([f"it has no {_list(self.missing)}"] if self.missing else []),
            *(
                [f"the network has no {_list(self.unexpected)}, which it has trained"]
                if self.unexpected
                else []
            ),
            *self.different[:_FEW],
        ]
        advice = "; strict=False leaves those as they are" if self.missing else ""
        return (
            f"{self.source} does not fit the network: {'; '.join(clauses)}; load it into the "
            f"network that was exported, by splitonnx.torch.export, which keeps names{advice}"
        )


def _list(names: Sequence[str]) -> str:
    rest = len(names) - _FEW
    return quote(names[:_FEW]) + (f" and {rest} more" if rest > 0 else "")
