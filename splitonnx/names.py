"""Names that bundles, messages and the command line share: phases, parties, targets and modes."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

TRAIN, PREDICT, EVALUATE, SHARE = "train", "predict", "evaluate", "share"
"""Names of phases."""
ACCUMULATE, UPDATE, WEIGH = "accumulate", "update", "weigh"
"""Names of the phases of a step that consists of several micro-batches.

``weigh`` measures how much each micro-batch counts, ``accumulate`` adds a micro-batch's gradients
to those before it, and ``update`` ends the step.
"""
STEP_PHASES = frozenset({TRAIN, ACCUMULATE, UPDATE})
"""The phases that a training step is made of; no other phase changes a party's state for good,
but ``share``."""
CLIENT, SERVER = "client", "server"
"""Names of parties."""
PER_CLIENT, SEQUENTIAL, SPLITFED_V1 = "per-client", "sequential", "splitfed-v1"
SPLITFED_V2, SYNCHRONOUS, ASYNCHRONOUS = "splitfed-v2", "synchronous", "asynchronous"
"""Names of a server's policies."""
ONE_MODEL = frozenset({SPLITFED_V2, SYNCHRONOUS, ASYNCHRONOUS})
"""The policies under which all clients train one model on the server.

Only the end of a round can be restored on both sides.
"""
OWN, JOINED = "@own", "@joined"
"""Suffixes of the value of a state tensor that a client shares, and of the joined value."""
LOSS = "loss"
"""The name of the loss among the results of a phase."""
COUNTED, TOTAL, WEIGHT = "@counted", "@total", "@weight"
"""Suffixes of results of an evaluation that say how to combine the means of several batches.

``accuracy@counted`` is the sum of the weights of what ``accuracy`` is the mean of, and
``accuracy@total`` the sum of the weighted terms.  If there are several losses, ``loss.a@weight`` is
the factor of ``loss.a`` in ``loss``.
"""

SCORES = "splitonnx.scores."
"""The first part of the name of scores that are predicted only to be evaluated."""

Target: TypeAlias = Literal["portable", "training"]
"""The operators of a party's graphs: standard ones only, or also ORT's fused gradient kernels."""
BatchNormMode: TypeAlias = Literal["train", "frozen"]
"""The statistics that BatchNormalization uses: those of the batch, or the running statistics."""
BatchNormModes: TypeAlias = BatchNormMode | dict[str, BatchNormMode] | None
"""One mode for all BatchNormalization nodes, or a dictionary from regular expressions to modes.

The expressions are searched for in the names of a node and of its tensors, and the last match
applies.  A node without a match keeps its own mode, as do all nodes if the value is ``None``.
"""
DropoutMode: TypeAlias = Literal["keep", "off"]
"""Dropout is active during training (``keep``) or never (``off``)."""
PORTABLE: Final = "portable"
TRAINING: Final = "training"
TARGETS: tuple[Target, ...] = get_args(Target)
Recompute: TypeAlias = Literal["client", "server", "both"]
"""Who computes its forward stage again before its backward stage, and keeps no values of it."""
ADAPTERS = "splitonnx.adapters"
"""Metadata key of the note about a model's adapters, which is JSON."""


def name_carried(state: str) -> str:
    """Return the name of the value that replaces a state that a model hands itself."""
    return f"{state}/next"
