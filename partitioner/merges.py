"""Join the trained weights of all parties into one plain ONNX model for inference."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir

from splitonnx.bundles import Bundle
from splitonnx.manifests import Role
from splitonnx.outputs import check_output
from splitonnx.partitioner.cutting.passes.forms import make_inference_form
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.lowerings.integer_kernels import describe_saturation
from splitonnx.partitioner.model_files import serialize_model, write_model
from splitonnx.partitioner.normalization.quantizations import fold_quantized
from splitonnx.partitioner.normalization.weights import restore_weights

_log = logging.getLogger(__name__)

def merge(bundle: Bundle | str | Path) -> bytes:
    """Join the parts of a bundle into one ONNX model that contains the trained weights.

    The model has the same inputs and outputs as the original model.  It is meant for inference:
    BatchNormalization uses its running statistics, and Dropout is removed.

    Args:
        bundle: a bundle, or the path of a bundle folder.

    Returns:
        The bytes of the model (opset 18 to 21, IR version 10), including its weights.

    Raises:
        BundleError, FormatError: the folder cannot be read.
        BundleMismatch: the parties are at different steps.
        UsageError: the model is too large for one file; :func:`write_merged` can write two files.
    """
    return serialize_model(
        _join_parts(bundle), "the merged model", "write_merged or `splitonnx merge`"
    )


def write_merged(bundle: Bundle | str | Path, path: str | Path, *, overwrite: bool = False) -> int:
    """Join the parts of a bundle like :func:`merge`, and write the model to ``path``.

    If the weights are too large for one ONNX file, they are written as external data to a second
    file, whose name is ``path`` with ``.data`` appended.  The weights are streamed, so they do not
    have to fit into memory.  Each file is moved into place only when it is complete, and the model
    file is moved last.  Existing files are replaced only if ``overwrite`` is true.

    Returns:
        The number of bytes written.

    Raises:
        UnwritableFile: a file cannot be written, or exists and must not be replaced.
        BundleError, FormatError, BundleMismatch: as raised by :func:`merge`.
    """
    target = Path(path)
    check_output(target, overwrite=overwrite)
    return write_model(_join_parts(bundle), target, overwrite=overwrite)


def collect_weights(bundle: Bundle, *, trained: bool = True) -> dict[str, np.ndarray]:
    """Return the weights of all parties, by name.

    The weights have their trained values or, if ``trained`` is false, their initial values.
    """
    weights: dict[str, np.ndarray] = {}
    for party in bundle.parties.values():
        source = party.state() if trained else party.weights
        roles = {spec.tensor.name: spec.role for spec in party.manifest.state}
        weights |= {n: a for n, a in source.items() if roles[n] is not Role.OPTIMIZER}
    return weights


@attribute_errors_to_pass("given its weights again")
def restore_model(bundle: Bundle, *, trained: bool = True) -> ir.Model:
    """Return the prepared model: the bundle's skeleton with the weights of all parties inserted.

    The weights have their trained values or, if ``trained`` is false, their initial values.

    Raises:
        ModelError: the skeleton is not a valid model.
    """
    model = open_model(bundle.skeleton)
    restore_weights(model.graph, collect_weights(bundle, trained=trained))
    return model


def _join_parts(bundle: Bundle | str | Path) -> ir.Model:
    return _join(bundle if isinstance(bundle, Bundle) else Bundle.load(bundle))


@attribute_errors_to_pass("merged")
def _join(bundle: Bundle) -> ir.Model:
    bundle.check_steps()
    model = restore_model(bundle)
    make_inference_form(model.graph)
    fold_quantized(model.graph)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():  # such as Dropout's ratio
            model.graph.initializers.pop(name)
    model.producer_name = "splitonnx"
    if (remark := describe_saturation(model.graph)) is not None:
        _log.warning("the merged model: %s", remark)
    return model
