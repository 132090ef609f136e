"""Manifests that say no more than what a metric needs: an output, and what it is compared with."""

from __future__ import annotations

from splitonnx.manifests import FORMAT, PartyManifest, ScoredOutput, ScoreKind
from splitonnx.tensors import TensorSpec

CLASSES, BINARY, VALUES = ScoreKind.CLASSES, ScoreKind.BINARY, ScoreKind.VALUES


def make_manifest(*scored: ScoredOutput, **shapes: tuple[int | str, ...]) -> PartyManifest:
    """Make a client's manifest whose outputs have these shapes."""
    outputs = tuple(TensorSpec(name=n, dtype="F32", shape=shape) for n, shape in shapes.items())
    return PartyManifest(
        format=FORMAT,
        party="client",
        digest="d1" * 32,
        target="portable",
        phases=(),
        state=(),
        files={},
        learning_rate=0.1,
        outputs=outputs,
        scored=scored,
    )
