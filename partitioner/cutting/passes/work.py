"""Define preparation passes, the facts that they rely on, and the state that they change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto

import onnx_ir as ir

from splitonnx.manifests import Role
from splitonnx.names import BatchNormModes, DropoutMode
from splitonnx.partitioner.cutting.passes.joined_statistics import Separation
from splitonnx.partitioner.cutting.passes.stored_options import (
    NONE_STORED,
    NOTHING,
    Ignored,
    StoredOptions,
)
from splitonnx.partitioner.normalization.constants.kept import Kept
from splitonnx.partitioner.normalization.dequantized.replacements import Dequantization


class Fact(Flag):
    """A property of the model that a pass requires, ensures or invalidates."""

    INLINED = auto()  # no node calls a function of the model
    STORED = auto()  # no initializer is also an input of the graph
    NAMED = auto()  # every node has a unique name
    QUANTIZED = auto()  # integer weights are quantized in the graph
    LIFTED = auto()  # weights are inputs of the graph
    ADAPTED = auto()  # operators belong to opset 18 to 21
    USUAL = auto()  # recurrences and operators of other domains are in standard form
    TYPED = auto()  # types and shapes are set if they can be inferred
    PADDED = auto()  # paddings are explicit if the shapes allow it
    FLAT = auto()  # sequences of known length are replaced by tensors
    FOLDED = auto()  # values that depend on no input are constants
    CHECKED = auto()  # ranks are valid for their operators
    REDUCED = auto()  # axes of reductions are explicit
    FORMS = auto()  # the training and inference forms are separate models
    WIDE = auto()  # both forms compute in float32
    MODES = auto()  # BatchNormalization and Dropout have each form's mode
    SEEDED = auto()  # random numbers are drawn from a key
    OUTPUTS = auto()  # optional outputs that gradients read are declared
    ROLES = auto()  # every weight has a role
    SMOOTH = auto()  # operators that depend on trained weights have gradients
    SHAPED = auto()  # shapes that follow from symbolic dimensions are set too


_NOTHING = Fact(0)


@dataclass(kw_only=True)
class Work:
    """The state that the passes share.

    It holds the model, which the passes change in place, the user's options, and the results.
    ``chosen_sizes`` are sizes above 1 that the user gave axes of inputs.
    ``stored`` are the options from the model's file that the user does not overrule, and
    ``ignored`` are names in them that have no effect.  ``constants`` are not trained, but may have
    been learned.
    """

    model: ir.Model
    batchnorm: BatchNormModes = None
    dropout: DropoutMode | None = None
    train: Sequence[str] = ()
    freeze: Sequence[str] = ()
    bound: Collection[str] = ()
    chosen_sizes: Collection[int] = ()
    ties: Sequence[tuple[str, str]] = ()
    stop_gradients: Sequence[str] = ()
    stored: StoredOptions = NONE_STORED
    ignored: Ignored = NOTHING
    states: Sequence[tuple[str, str]] = ()
    initial_states: Mapping[str, ir.TensorProtocol] = field(default_factory=dict)
    stored_inputs: tuple[ir.Value, ...] = ()
    dequantize: bool = False
    dequantized: Dequantization | None = None
    given: frozenset[str] = frozenset()
    constants: Sequence[Kept] = ()
    weights: dict[str, ir.TensorProtocol] = field(default_factory=dict)
    masters: Mapping[str, ir.TensorProtocol] = field(default_factory=dict)
    buffers: Mapping[str, str] = field(default_factory=dict)
    frozen_statistics: Collection[str] = ()
    roles: Mapping[str, Role] = field(default_factory=dict)
    separations: Sequence[Separation] = ()
    has_own_statistics: bool = False
    freed: list[str] = field(default_factory=list)
    decided: Sequence[str] = ()
    forms: tuple[ir.Model, ...] = ()

    @property
    def training(self) -> ir.Model:
        """The training form of the model."""
        return self.forms[0]

    @property
    def inference(self) -> ir.Model:
        """The inference form of the model."""
        return self.forms[1]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One step of the preparation.

    ``run`` performs the pass.  ``work`` describes the pass in error messages, after the words
    "while the model was".  The facts in ``requires`` must be true before the pass.  After the pass,
    the facts in ``ensures`` are true, and the facts in ``spoils`` may be false.
    """

    work: str
    run: Callable[[Work], object]
    requires: Fact = _NOTHING
    ensures: Fact = _NOTHING
    spoils: Fact = _NOTHING
