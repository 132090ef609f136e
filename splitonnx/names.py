"""Names that bundles, messages and the command line share: phases, parties, targets and modes."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

TRAIN, PREDICT, EVALUATE = "train", "predict", "evaluate"
"""Names of phases."""
CLIENT, SERVER = "client", "server"
"""Names of parties."""
LOSS = "loss"
"""The name of the loss among the results of a phase."""

Target: TypeAlias = Literal["portable", "training"]
"""The operators of a party's graphs: standard ones only, or also ORT's fused gradient kernels."""
BatchNormMode: TypeAlias = Literal["train", "frozen"]
"""The statistics that BatchNormalization uses: those of the batch, or the running statistics."""
BatchNormModes: TypeAlias = BatchNormMode | dict[str, BatchNormMode] | None
"""One mode for every BatchNormalization, or modes by regular expressions for the names of nodes and
of their tensors, of which the last that matches applies; ``None`` keeps each node's own mode."""
DropoutMode: TypeAlias = Literal["keep", "off"]
"""Dropout is active during training (``keep``) or never (``off``)."""
PORTABLE: Final = "portable"
TRAINING: Final = "training"
TARGETS: tuple[Target, ...] = get_args(Target)
