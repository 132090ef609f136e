"""The choice of kernels: in bodies, too, and by the node alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from splitonnx.bundles import Bundle
from splitonnx.names import PORTABLE, TRAIN, TRAINING, Target
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.lowerings.kernels.choices import choose_kernels
from splitonnx.partitioner.partitions import cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts
from splitonnx.runtime.engine.layouts.convolutions import DOMAIN, block_convolutions
from tests.partitioner.lowerings.kernels.chosen import build
from tests.support.zoo import ZOO

KERNELS = frozenset({
    "And", "BatchNormInternal", "BatchNormalization", "BatchNormalizationGrad", "Conv", "ConvGrad",
    "ConvTranspose", "FusedMatMul", "Gemm", "HardSigmoid", "MatMul", "ReluGrad", f"{DOMAIN}/Conv",
})  # fmt: skip
"""The operators that are chosen, and those that they stand for."""
BLOCK = 16
"""Channels of a block on a processor with AVX-512; others have fewer."""


def test_nodes_in_bodies_get_their_kernels() -> None:
    y = np.ones((2, 3), np.float32)
    inner = build("ReluGrad", {"dy": y, "y": y}, ["dx"], domain="com.microsoft").graph
    outer = ir.Node("", "If", [], [ir.AttrGraph("then_branch", inner)], num_outputs=1)
    choose_kernels(ir.Graph([], [], nodes=[outer], opset_imports={"": 18}))
    assert [node.op_type for node in inner if node.op_type != "Constant"] == ["HardSigmoid", "Mul"]


def count_kernels(bundle: Bundle) -> Counter[str]:
    """Count the chosen operators that compute the loss and its gradients, of all parties.

    They are those of the graphs as the engine loads them.
    """
    counts: Counter[str] = Counter()
    for party in bundle.parties.values():
        for stage in party.manifest.phase(TRAIN).stages:
            if not stage.name.endswith(("update", "norms")):
                loaded = block_convolutions(party.graphs[stage.graph], BLOCK)
                graph = onnx.load_from_string(loaded).graph
                counts.update(
                    f"{DOMAIN}/{node.op_type}" if node.domain == DOMAIN else node.op_type
                    for node in graph.node
                )
    return Counter({kind: counts[kind] for kind in counts if kind in KERNELS})


@pytest.mark.parametrize("target", [TRAINING, PORTABLE])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_kernels_of_a_split_training_are_those_of_an_unsplit_one(
    name: str, target: Target
) -> None:
    prepared, loss = prepare(open_model(ZOO[name].build())), ZOO[name].loss
    names = [None, *(found.tensor for found in list_cuts(prepared, None))]
    whole, *splits = (
        count_kernels(
            cut_prepared(prepared, at=at, loss=loss, client_target=target, server_target=target)
        )
        for at in names
    )
    assert splits
    for at, split in zip(names[1:], splits, strict=True):
        assert split == whole, at
