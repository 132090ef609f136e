"""Codecs of what crosses a cut: how activations and gradients are written to be sent.

A codec is named by a text: ``fp16``, ``int8``, ``topk=0.1``.  Both directions have one: the
*forward* codec is for activations, and the *backward* codec is for their gradients.  This module
reads the texts.  What a codec computes is in :mod:`splitonnx.partitioner.cutting.transforms`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from splitonnx.errors import UsageError, quote

FORWARD, BACKWARD = "fwd", "bwd"
"""The names of the directions: of activations, and of their gradients."""

FEEDBACK = "+ef"
"""The end of the name of a codec with error feedback."""


class CodecKind(StrEnum):
    """What a codec does with the numbers of a tensor."""

    FP32 = "fp32"  # sends them as they are
    FP16 = "fp16"  # rounds them to 16 bits, with five for the exponent
    BF16 = "bf16"  # rounds them to 16 bits, with eight for the exponent, as 32 bits have
    INT8 = "int8"  # rounds them to 255 steps, with a scale for each channel
    INT4 = "int4"  # rounds them to 15 steps, with a scale for each block
    TOPK = "topk"  # sends those with the largest absolute values
    RANDTOPK = "randtopk"  # does the same, but draws some of them at random


_WITH_FRACTION = frozenset({CodecKind.TOPK, CodecKind.RANDTOPK})


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A codec of one direction; ``fraction`` is the part of the numbers that ``topk`` keeps.

    ``has_feedback`` means that what is left out of a tensor is added to that of the next step.
    """

    kind: CodecKind
    fraction: float | None = None
    has_feedback: bool = False

    def __str__(self) -> str:
        named = self.kind if self.fraction is None else f"{self.kind}={self.fraction:g}"
        return f"{named}{FEEDBACK if self.has_feedback else ''}"

    @property
    def is_plain(self) -> bool:
        """Return whether the codec sends tensors as they are."""
        return self.kind is CodecKind.FP32


PLAIN = Codec(kind=CodecKind.FP32)
"""The codec that sends tensors as they are."""


@dataclass(frozen=True, kw_only=True)
class WireCodecs:
    """The codecs of both directions."""

    forward: Codec = PLAIN
    backward: Codec = PLAIN

    def __str__(self) -> str:
        if self.forward == self.backward:
            return str(self.forward)
        return f"{FORWARD}={self.forward},{BACKWARD}={self.backward}"

    @property
    def is_plain(self) -> bool:
        """Return whether both codecs send tensors as they are."""
        return self.forward.is_plain and self.backward.is_plain


def read_wire(wire: str | Mapping[str, str] | None) -> WireCodecs:
    """Read codecs, such as ``int8`` for both directions or ``fwd=int8,bwd=bf16`` for each its own.

    A dictionary maps ``fwd`` and ``bwd`` to the names of their codecs.  A direction without a codec
    is not encoded.

    Raises:
        UsageError: the text does not name known codecs, or names two for one direction.
    """
    if wire is not None and not isinstance(wire, str | Mapping):
        raise UsageError(f"wire must be a text such as 'int8' or a dictionary, not {wire!r}")
    items = _split(wire) if isinstance(wire, str) else list((wire or {}).items())
    found: dict[str, Codec] = {}
    for direction, text in items:
        if direction not in ("", FORWARD, BACKWARD):
            raise UsageError(
                f"--wire: there is no direction '{direction}'; write fwd=... or bwd=..."
            )
        if not isinstance(text, str):
            raise UsageError(f"--wire: the codec of {direction} must be a text, not {text!r}")
        codec = read_codec(text)
        for name in (direction,) if direction else (FORWARD, BACKWARD):
            if name in found:
                raise UsageError(
                    f"--wire names two codecs for {name}, {found[name]} and {codec}; name one"
                )
            found[name] = codec
    return WireCodecs(forward=found.get(FORWARD, PLAIN), backward=found.get(BACKWARD, PLAIN))


def _split(text: str) -> Iterator[tuple[str, str]]:
    """Yield each direction in a text with the name of its codec; the direction may be empty."""
    for item in text.split(","):
        before, mark, after = item.strip().partition("=")
        if before in _WITH_FRACTION or not mark:
            yield "", item.strip()
        else:
            yield before.strip(), after.strip()


def read_codec(text: str) -> Codec:
    """Read one codec, such as ``int8``, ``topk=0.1``, or ``topk=0.1+ef`` with error feedback.

    Raises:
        UsageError: there is no such codec, or its fraction is missing or out of range.
    """
    has_feedback = text.endswith(FEEDBACK)
    name, mark, rest = text.removesuffix(FEEDBACK).partition("=")
    if name not in {kind.value for kind in CodecKind}:
        raise UsageError(
            f"--wire: there is no codec '{text}'; choose one of {quote(CodecKind)}, the last two "
            "with the part that is kept, as topk=0.1"
        )
    kind = CodecKind(name)
    if kind not in _WITH_FRACTION:
        if mark:
            raise UsageError(f"--wire: the codec {kind} takes no number, but '{text}' has one")
        if has_feedback and kind is CodecKind.FP32:
            raise UsageError(f"--wire: {kind} leaves nothing out, so '{text}' has no feedback")
        return Codec(kind=kind, has_feedback=has_feedback)
    try:
        fraction = float(rest)
    except ValueError:
        fraction = float("nan")
    if not 0 < fraction < 1:  # NaN is refused too
        raise UsageError(
            f"--wire: '{text}' should say which part of the numbers is kept, between 0 and 1, as "
            f"{kind}=0.1"
        )
    return Codec(kind=kind, fraction=fraction, has_feedback=has_feedback)
