"""The pairs listed for a U-shape are those that `cut` takes, and cost what the cut then costs."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from splitonnx.bundles import Bundle
from splitonnx.commands.printing import summarize_bundle
from splitonnx.disclosures import list_sent
from splitonnx.errors import CutError
from splitonnx.names import CLIENT, SERVER, TRAIN
from splitonnx.partitioner.partitions import cut_prepared
from splitonnx.partitioner.reports.u_shapes.pairs import PairCandidate, list_pairs
from tests.end_to_end.test_listed_cuts import NAMES, list_tensors, prepare_model, read_loss

WHOLE = ("residual", "two_streams", "embedding", "mse", "04_aux_head", "41_lost_detach")
"""Models of which all pairs are tried each time."""
SAMPLED = ("attention", "upsampling", "batchnorm_trained", "shape_paths", "jax-mlp")
"""Models of which a few pairs are tried each time; `make sweep` tries those of all models."""
FEW, MANY, MOST_TENSORS = 4, 40, 30

Pairs = dict[tuple[str, str], PairCandidate]


def list_by_name(name: str) -> Pairs:
    found = list_pairs(prepare_model(name))
    return {(pair.at[0], pair.tail_at[0]): pair for pair in found}


def try_pair(name: str, at: str, tail_at: str) -> Bundle | None:
    try:
        return cut_prepared(prepare_model(name), at=at, tail_at=tail_at, loss=read_loss(name))
    except CutError:
        return None


def hold(name: str, tried: Iterable[tuple[str, str]]) -> None:
    """Hold what is listed against the cut of each pair in ``tried``."""
    listed = list_by_name(name)
    for at, tail_at in tried:
        bundle, pair = try_pair(name, at, tail_at), listed.get((at, tail_at))
        assert (pair is None) is (bundle is None), (at, tail_at)
        if pair is not None and bundle is not None:
            hold_figures(pair, bundle)


def count_sent(bundle: Bundle, party: str) -> int | None:
    """Count the bytes per sample that the manifest declares."""
    tensors = list_sent(bundle.client.manifest, TRAIN, party).tensors
    sizes = [tensor.bytes_per_sample for tensor in tensors]
    return None if None in sizes else sum(size or 0 for size in sizes)


def hold_figures(pair: PairCandidate, bundle: Bundle) -> None:
    """Hold what a pair sends and trains against what the manifest declares."""
    assert pair.bytes_up == count_sent(bundle, CLIENT)
    assert pair.bytes_down == count_sent(bundle, SERVER)
    parties = summarize_bundle(bundle)["parties"]
    assert parties[CLIENT]["parameters"] == pair.head_parameters + pair.tail_parameters
    assert parties[SERVER]["parameters"] == pair.server_parameters


def list_every(name: str) -> list[tuple[str, str]]:
    tensors = list_tensors(name)
    return [(first, last) for first in tensors for last in tensors]


def draw(name: str, count: int) -> list[tuple[str, str]]:
    """Draw some pairs that are listed, and as many others."""
    choice, listed = random.Random(3), list_by_name(name)
    others = [pair for pair in list_every(name) if pair not in listed]
    return [p for row in ([*listed], others) for p in choice.sample(row, min(count, len(row)))]


@pytest.mark.parametrize("name", WHOLE)
def test_of_all_pairs_those_listed_are_taken(name: str) -> None:
    hold(name, list_every(name))


@pytest.mark.parametrize("name", SAMPLED)
def test_of_some_pairs_those_listed_are_taken(name: str) -> None:
    hold(name, draw(name, FEW))


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_of_each_model_the_pairs_listed_are_taken(name: str) -> None:
    is_small = len(list_tensors(name)) <= MOST_TENSORS
    hold(name, list_every(name) if is_small else draw(name, MANY))
