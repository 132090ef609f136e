"""An engine that computes nothing but hashes: every output follows from all of its stage's inputs.

State trained with it tells every step that it went through, in which order and with what, as a
chain of hashes does, at a fraction of the time.  It stands in for ONNX Runtime alone; executors,
sessions and clients are the real ones.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from splitonnx.manifests import PartyManifest
from splitonnx.runtime.engine.engines import Engine, LoadedStage
from splitonnx.runtime.engine.providers import CPU, PROVIDERS
from splitonnx.tensors import DTYPES, TensorSpec

ROWS = 2
"""What every symbolic dimension is."""
Form = tuple[np.dtype[Any], tuple[int, ...], int]
"""An output's dtype, shape and number of elements."""
_SCALAR: Form = (np.dtype(np.float32), (), 1)
"""What an output is of which no manifest tells."""


class HashingEngine(Engine):
    """Runs the stages of ``manifests``, which may be several parties'.

    With ``drifts`` no two runs of a stage come to the same, so that what was computed again shows.
    """

    def __init__(self, manifests: Iterable[PartyManifest], *, drifts: bool = False) -> None:
        self.provider = PROVIDERS[CPU]
        self._runs = itertools.count() if drifts else itertools.repeat(0)
        self._outputs: dict[tuple[str, str], tuple[str, ...]] = {}
        self._specs: dict[str, TensorSpec] = {}
        for manifest in manifests:
            self._learn(manifest)
        self._forms = {name: _read_form(spec) for name, spec in self._specs.items()}

    def load(
        self,
        name: str,
        graph: bytes,
        *,
        training: bool,
        steady: Collection[str] = (),
        sums: Mapping[str, str] = {},
        early: Collection[str] = (),
    ) -> LoadedStage:
        """Look a stage up by its name and its file's digest."""
        outputs = self._outputs[name, hashlib.sha256(graph).hexdigest()]
        return LoadedStage(name=name, outputs=outputs, session=None)

    def from_array(self, array: np.ndarray) -> Any:
        """Hand an array over as it is."""
        return array

    def to_array(self, tensor: Any) -> np.ndarray:
        """Hand it back."""
        array: np.ndarray = tensor
        return array

    def run(self, stage: LoadedStage, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Hash the inputs into outputs between 0 and 1."""
        seen = hashlib.sha256(f"{stage.name} {next(self._runs)}".encode())
        for name in sorted(feeds):
            seen.update(name.encode())
            seen.update(np.ascontiguousarray(feeds[name]).tobytes())
        return self._draw(stage.outputs, seen.digest())

    def _learn(self, manifest: PartyManifest) -> None:
        kept = [*(spec.tensor for spec in manifest.state), *manifest.accumulators]
        states = {tensor.name: tensor for tensor in kept}
        for phase in manifest.phases:
            for stage in phase.stages:
                self._outputs[stage.name, manifest.files[stage.graph]] = stage.outputs
            self._specs.update((wire.tensor.name, wire.tensor) for wire in phase.wires)
            self._specs.update((value, states[name]) for name, value in phase.commits.items())
        self._specs.update((spec.name, spec) for spec in manifest.outputs)

    def _draw(self, names: Sequence[str], seed: bytes) -> dict[str, Any]:
        """Draw all outputs from one stream, one after the other."""
        forms = [self._forms.get(name, _SCALAR) for name in names]
        stream = hashlib.shake_128(seed).digest(2 * sum(size for *_, size in forms))
        drawn = np.frombuffer(stream, np.uint16) / 65536
        outputs, end = {}, 0
        for name, (dtype, shape, size) in zip(names, forms, strict=True):
            outputs[name] = drawn[end : end + size].astype(dtype).reshape(shape)
            end += size
        return outputs


def _read_form(spec: TensorSpec) -> Form:
    shape = tuple(dim if isinstance(dim, int) else ROWS for dim in spec.shape)
    return np.dtype(DTYPES[spec.dtype]), shape, math.prod(shape)
