"""Parts joined again: the trained weights of all parties in one plain ONNX model for inference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import BundleMismatch
from splitonnx.manifests import Role
from splitonnx.partitioner.preparations import settle
from splitonnx.partitioner.weights import restore_weights


def merge(bundle: Bundle | str | Path) -> bytes:
    """Join the parts of a bundle into one ONNX model, with the weights as they are trained now.

    The model has the inputs and outputs of the original and is in inference form:
    BatchNormalization uses its running statistics, Dropout is gone.

    Args:
        bundle: a bundle, or the folder of one.

    Returns:
        The model's bytes (opset 18 to 21, IR version 10), weights included.

    Raises:
        BundleError, FormatError: the folder cannot be read.
        BundleMismatch: the parties stand at different steps.
    """
    loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    _check_steps(loaded)
    model = ir.from_proto(onnx.load_from_string(loaded.skeleton))
    restore_weights(model.graph, collect_weights(loaded))
    settle(model.graph)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():  # Dropout's ratio, for one
            model.graph.initializers.pop(name)
    model.producer_name = "splitonnx"
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def collect_weights(bundle: Bundle, *, trained: bool = True) -> dict[str, np.ndarray]:
    """Gather every party's weights: as trained, or as training started from them."""
    weights: dict[str, np.ndarray] = {}
    for party in bundle.parties.values():
        source = party.state() if trained else party.weights
        roles = {spec.tensor.name: spec.role for spec in party.manifest.state}
        weights |= {n: a for n, a in source.items() if roles[n] is not Role.OPTIMIZER}
    return weights


def _check_steps(bundle: Bundle) -> None:
    client, server = bundle.client, bundle.server
    if server is not None and client.step != server.step:
        raise BundleMismatch("the number of steps trained", _step(client), _step(server))


def _step(party: PartyBundle) -> str:
    return f"{party.step} ({party.manifest.party})"
