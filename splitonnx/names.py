"""Names that bundles, messages and the command line share: phases, parties, targets, modes."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

TRAIN, PREDICT, EVALUATE = "train", "predict", "evaluate"
"""Names of phases."""
CLIENT, SERVER = "client", "server"
"""Names of parties."""
LOSS = "loss"
"""Name of the loss among a phase's results."""

Target: TypeAlias = Literal["portable", "training"]
"""What a party's graphs are made of: standard operators, or ORT's fused gradient kernels."""
BatchNormMode: TypeAlias = Literal["train", "frozen"]
"""What BatchNormalization normalizes with: the batch's statistics, or the running ones."""
DropoutMode: TypeAlias = Literal["keep", "off"]
"""Whether Dropout drops anything."""
PORTABLE: Final = "portable"
TRAINING: Final = "training"
TARGETS: tuple[Target, ...] = get_args(Target)
