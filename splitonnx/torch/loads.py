"""Load trained weights into a PyTorch network: from a bundle, or from a merged model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitonnx.bundles import Bundle
from splitonnx.errors import UsageError, WeightsMismatch
from splitonnx.manifests import Role
from splitonnx.names import ADAPTERS, TRAIN, name_carried
from splitonnx.torch.environment import import_torch
from splitonnx.torch.matches import Weights, match
from splitonnx.torch.networks import read_layout

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The result of :func:`load`.

    ``step`` is the number of steps for which the weights were trained, or ``None`` for a merged
    model, which does not contain this number.  ``loaded`` are the names of the network's tensors
    that were replaced.  ``kept`` are the names of the tensors that keep their values, such as
    ``num_batches_tracked``.
    """

    step: int | None
    loaded: tuple[str, ...]
    kept: tuple[str, ...]


def load(source: Bundle | str | Path | bytes, model: Any, *, strict: bool = True) -> Loaded:
    """Load the trained weights of all parties into a PyTorch network.

    Parameters and the running statistics of BatchNormalization are replaced.  Other buffers, such
    as ``num_batches_tracked``, keep their values.  Tied weights stay tied.  PyTorch's optimizers
    are not changed.  Everything is checked before the first tensor is replaced.

    Args:
        source: a bundle; or the path of its folder, with both trained parties; or a merged model,
            as a path that ends in ``.onnx`` or as bytes.
        model: the network that was exported, or another one of the same class.
        strict: whether ``source`` must contain every running statistic and every parameter that
            requires a gradient.  An export does not contain parameters that the network does not
            use.

    Raises:
        TorchNeeded: PyTorch is missing or too old.
        BundleError, FormatError, ModelError: ``source`` cannot be read.
        UsageError: ``source`` is a model that splitonnx did not merge, or has adapters that were
            not folded.
        BundleMismatch: the parties are at different steps.
        WeightsMismatch: names or shapes do not fit; nothing was loaded.
    """
    torch = import_torch("splitonnx.torch.load")
    weights, step = _read(source)
    if step == 0:
        _log.warning("%s was not trained yet: its weights are those of the export", weights.source)
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if _has_shape(tensor)}
    found = match(weights, read_layout(model), shapes, strict=strict)
    fresh = {name: torch.from_numpy(np.array(array)) for name, array in found.items()}
    model.load_state_dict({**state, **fresh}, strict=True)
    return Loaded(
        step=step,
        loaded=tuple(fresh),
        kept=tuple(name for name in state if name not in fresh),
    )


def _has_shape(value: Any) -> bool:
    return hasattr(value, "shape")  # an extra state may be any object


def _read(source: Bundle | str | Path | bytes) -> tuple[Weights, int | None]:
    if isinstance(source, bytes) or (
        isinstance(source, str | Path) and Path(source).suffix == ".onnx"
    ):
        return _read_merged(source), None
    bundle = source if isinstance(source, Bundle) else Bundle.load(source)
    bundle.check_steps()
    label = "the bundle" if isinstance(source, Bundle) else str(source)
    if ADAPTERS.encode() in bundle.skeleton:
        raise _refuse_adapters(label)
    arrays: dict[str, np.ndarray] = {}
    trained: set[str] = set()
    carried = {source for _, source in bundle.manifest.recipe.states}
    for party in bundle.parties.values():  # residuals of codecs are no weights either
        commits = party.manifest.phase(TRAIN).commits
        carried |= {name for name, made in commits.items() if made == name_carried(name)}
    for party in bundle.parties.values():
        roles = {spec.tensor.name: spec.role for spec in party.manifest.state}
        state = party.state()
        kept = {n for n, role in roles.items() if role is not Role.OPTIMIZER and n not in carried}
        arrays |= {n: a for n, a in state.items() if n in kept}
        trained |= {n for n in kept if roles[n] in (Role.PARAMETER, Role.BUFFER)}
    ties = {
        dropped: (kept, f"{dropped}.tied".encode() in bundle.skeleton)
        for kept, dropped in bundle.manifest.recipe.ties
    }
    weights = Weights(source=label, arrays=arrays, trained=frozenset(trained), ties=ties)
    return weights, bundle.client.step


def _refuse_adapters(label: str) -> UsageError:
    return UsageError(
        f"{label} has adapters, which the network does not; fold them into its weights with "
        "splitonnx merge --fold (fold=True), and load the folded model"
    )


def _read_merged(source: str | Path | bytes) -> Weights:
    """Read the weights of a merged model, which does not record which were trained."""
    from splitonnx.extras import load as load_module

    gates = load_module("splitonnx.partitioner.gate.gates", "splitonnx.torch.load")
    opened = gates.open_model(source if isinstance(source, bytes) else Path(source))
    label = "the merged model" if isinstance(source, bytes) else str(source)
    if opened.producer_name != "splitonnx":
        raise UsageError(
            f"{label} was not merged by splitonnx, but written by "
            f"{opened.producer_name or 'an unnamed exporter'}; merge a trained bundle first"
        )
    if ADAPTERS in opened.metadata_props:
        raise _refuse_adapters(label)
    arrays = {
        name: np.array(value.const_value.numpy())
        for name, value in opened.graph.initializers.items()
        if value.const_value is not None
    }
    if not arrays:
        raise WeightsMismatch(label, different=("it has no weights",))
    return Weights(source=label, arrays=arrays, trained=frozenset())
