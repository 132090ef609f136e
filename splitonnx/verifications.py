"""Check that split training of a model gives the same results as training it without a cut.

The parts of a bundle are trained in one process, connected by the in-memory transport, and the same
model is trained without a cut.  After every step, the losses and all parameters are compared.  This
module uses both the partitioner and the runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import UsageError
from splitonnx.manifests import Role
from splitonnx.micro_batches import enlarge
from splitonnx.names import CLIENT, LOSS, SERVER, TRAIN
from splitonnx.optimizers import read_optimizer
from splitonnx.partitioner.merges import restore_model
from splitonnx.partitioner.normalization.weights import pin_names
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.datasets import DataSource, open_dataset
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory


@dataclass(frozen=True, kw_only=True)
class StepComparison:
    """The comparison of split and unsplit training after one step.

    ``differences`` maps ``loss`` and the name of every parameter and running statistic to the
    relative difference: the largest absolute difference divided by the largest absolute value.
    """

    step: int
    split_loss: float
    whole_loss: float
    differences: Mapping[str, float]

    @property
    def difference(self) -> float:
        """Return the largest relative difference of this step."""
        return max(self.differences.values())


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of :func:`verify`: the comparison of each step, and the tolerance ``rtol``.

    ``wire`` are the codecs of what crosses the cut.  The model without a cut is trained without
    them, so their error is part of the differences.
    """

    steps: tuple[StepComparison, ...]
    rtol: float
    wire: str = ""

    @property
    def largest_difference(self) -> float:
        """Return the largest relative difference of any tensor after any step."""
        return max(step.difference for step in self.steps)

    @property
    def ok(self) -> bool:
        """Return whether no difference between split and unsplit training exceeds ``rtol``."""
        return self.largest_difference <= self.rtol


def verify(
    bundle: Bundle | str | Path,
    data: DataSource,
    *,
    steps: int = 5,
    batch_size: int = 32,
    rtol: float = 1e-5,
    seed: int = 0,
    accumulate: int = 1,
) -> Verification:
    """Train a model both split and unsplit, and compare the results after each step.

    Both runs start from the bundle's initial weights, even if the bundle has already been trained.
    What crosses the cut is encoded as the bundle says, and the codecs' error is part of the result.
    Nothing is written.  Both runs use one thread, so the difference is exactly 0 wherever both run
    the same kernels.

    Args:
        bundle: a bundle, or its folder.
        data: training data in any form that :meth:`Client.fit` accepts; the first ``steps`` batches
            of a shuffled epoch are used.
        steps: the number of optimizer steps to compare.
        batch_size: the number of samples per step.
        rtol: the largest relative difference that counts as equal.
        seed: the seed for shuffling and Dropout in both runs.
        accumulate: the number of micro-batches that each step's batch is divided into.

    Raises:
        UsageError: ``steps`` is less than one, or the data contain no samples.
        SplitonnxError: another error occurred during cutting or training.
    """
    loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    if steps < 1:
        raise UsageError(f"verify compares at least one step, not {steps}")
    compared = tuple(compare_steps(loaded, data, steps, batch_size, seed, accumulate))
    if not compared:
        raise UsageError("the data hold no sample to train with")
    wire = loaded.manifest.recipe.wire
    codecs = "" if wire is msgspec.UNSET else wire
    return Verification(steps=compared, rtol=rtol, wire=codecs)


def compare_steps(
    bundle: Bundle, data: DataSource, steps: int, batch_size: int, seed: int, accumulate: int = 1
) -> Iterator[StepComparison]:
    """Train for ``steps`` steps, both split and unsplit, and yield a comparison after each step."""
    whole = leave_whole(bundle)
    parties = {name: _rewind(party) for name, party in bundle.parties.items()}
    server = Executor(parties[SERVER], Engine(threads=1)) if SERVER in parties else None
    link = None if server is None else connect_in_memory(server)
    dataset = open_dataset(data)
    kept = {spec.tensor.name for party in parties.values() for spec in party.manifest.state}
    dataset.check(enlarge(parties[CLIENT].manifest.phase(TRAIN).data, accumulate), kept)
    batches = dataset.batches(batch_size, seed=seed, epoch=0)
    with (
        Client(parties[CLIENT], link, threads=1, seed=seed) as split,
        Client(_rewind(whole.client), None, threads=1, seed=seed) as unsplit,
    ):
        for step, batch in enumerate(islice(batches, steps)):
            split_loss = float(split.step(batch, accumulate=accumulate)[LOSS])
            whole_loss = float(unsplit.step(batch, accumulate=accumulate)[LOSS])
            state = dict(split.state())
            if link is not None:
                link.drain()
                state |= link.executor.state()
            differences = {LOSS: _compare(np.float64(split_loss), np.float64(whole_loss))}
            wanted = {
                s.tensor.name
                for s in whole.client.manifest.state
                if s.role in (Role.PARAMETER, Role.BUFFER)
            }
            for name, value in unsplit.state().items():
                if name in wanted:
                    differences[name] = _compare(state[name], value)
            yield StepComparison(
                step=step,
                split_loss=split_loss,
                whole_loss=whole_loss,
                differences=differences,
            )


def leave_whole(bundle: Bundle) -> Bundle:
    """Build an uncut bundle with the model, loss, optimizer and initial weights of ``bundle``.

    The recipe's ties and stopped gradients are not applied again, because the bundle's model
    already includes them.
    """
    recipe = bundle.manifest.recipe
    specs = [spec for party in bundle.parties.values() for spec in party.manifest.state]
    trained = [spec.tensor.name for spec in specs if spec.role is Role.PARAMETER]
    return cut(
        restore_model(bundle, trained=False),
        at=None,
        loss=recipe.list_losses(),
        output=recipe.output,
        optimizer=read_optimizer(recipe.optimizer),
        batchnorm=recipe.batchnorm,
        dropout=recipe.dropout,
        states=recipe.states,
        train=pin_names(trained),  # independent of the patterns in the recipe
        freeze=["."],
        client_target=recipe.server_target,
    )


def _rewind(party: PartyBundle) -> PartyBundle:
    """Return the party as it was before any training, without a folder to write to."""
    return PartyBundle(manifest=party.manifest, graphs=party.graphs, weights=party.weights)


def _compare(actual: np.ndarray | np.float64, expected: np.ndarray | np.float64) -> float:
    """Return the largest absolute difference divided by the largest value; 0 for equal tensors."""
    difference = float(np.max(np.abs(np.subtract(actual, expected, dtype=np.float64)), initial=0.0))
    if difference == 0.0:
        return 0.0
    scale = float(np.max(np.abs(np.asarray(expected, np.float64)), initial=0.0))
    return difference / scale if scale else float("inf")
