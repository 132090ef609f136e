"""From a model to a bundle: prepare, attach the loss, differentiate once, cut into stages.

This is the partitioner's table of contents; each step is a module of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.bundles import Bundle
from splitonnx.errors import UsageError
from splitonnx.manifests import Recipe
from splitonnx.names import TARGETS, TRAINING, BatchNormMode, DropoutMode, Target
from splitonnx.optimizers import AdamW, Optimizer, describe_optimizer
from splitonnx.partitioner.cutting.assemblies import assemble
from splitonnx.partitioner.cutting.joints import build_predict, build_training
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import ModelSource, open_model
from splitonnx.partitioner.graphs.pauses import pause_collection
from splitonnx.partitioner.graphs.traversals import is_float


@pause_collection()
def cut(
    model: ModelSource | ir.Model,
    *,
    at: str | Sequence[str] | None,
    tail_at: str | Sequence[str] = (),
    loss: str = "cross-entropy",
    output: str | None = None,
    optimizer: Optimizer | None = None,
    batchnorm: BatchNormMode | None = None,
    dropout: DropoutMode | None = None,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    client_target: Target = TRAINING,
    server_target: Target = TRAINING,
) -> Bundle:
    """Cut a model into a client's and a server's part, ready to be trained.

    Args:
        model: a path, the bytes of an ONNX model, or a loaded one.  It is not changed.  An
            ``onnx_ir`` model is taken to be well-formed, and is consumed.
        at: the tensors (by tensor, node or glob pattern) that go from client to server.  The
            model's part up to them is the client's head.  ``None`` leaves the model whole, for
            training without a server.
        tail_at: the tensors that come back to the client for a U-shaped cut: what is behind
            them, the loss and the labels are the client's too.
        loss: ``cross-entropy``, ``mse``, ``l1``, ``bce-with-logits``, or ``from-model`` where
            ``output`` is the loss; see :func:`losses.attach_loss`.
        output: the model output that the loss is taken of; the first float one by default.
        optimizer: ``AdamW(lr=1e-3)`` by default.
        batchnorm: ``train`` normalises by the batch and keeps running statistics, ``frozen`` uses
            the running statistics; by default as each node says.
        dropout: ``keep`` turns every Dropout on, ``off`` off; by default as each node says.
        train: regular expressions; each means the parameters whose name it finds, and where it
            finds none, the constants, which become parameters.  It overrules ``freeze``.
        freeze: regular expressions; parameters whose name one of them finds keep their value.
        client_target, server_target: ``training`` keeps ORT's fused gradient kernels,
            ``portable`` uses standard ONNX operators only, for stock ONNX Runtime.

    Returns:
        The bundle, in memory; ``bundle.save(folder)`` writes it.

    Raises:
        ModelError: the model cannot be read, prepared or differentiated.
        CutError: the tensors do not exist or do not divide the model.
        UsageError: arguments contradict each other.
        ForbiddenOperator: an internal error; the bundle would not run.
    """
    optimizer = optimizer or AdamW(lr=1e-3)
    for target in (client_target, server_target):
        if target not in TARGETS:
            raise UsageError(f"there is no target '{target}'; choose portable or training")
    opened = model if isinstance(model, ir.Model) else open_model(model)
    prepared = prepare(opened, batchnorm=batchnorm, dropout=dropout, train=train, freeze=freeze)
    names_at, names_tail = _list_names(at), _list_names(tail_at)
    output = choose_output(prepared, output)
    recipe = Recipe(
        at=names_at,
        tail_at=names_tail,
        loss=loss,
        output=output,
        optimizer=describe_optimizer(optimizer),
        batchnorm=batchnorm,
        dropout=dropout,
        train=tuple(train),
        freeze=tuple(freeze),
        client_target=client_target,
        server_target=server_target,
    )
    training = build_training(prepared, names_at, names_tail, loss, output)
    predict = build_predict(prepared, names_at, names_tail)
    return assemble(prepared, training, predict, recipe, optimizer)


def _list_names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def choose_output(prepared: PreparedModel, output: str | None) -> str:
    """Return the output that a loss is taken of: the one named, or else the model's first.

    Raises:
        UsageError: the model has no such output, or none that depends on its inputs.
    """
    predicted = {value.name for value in prepared.inference.graph.outputs}
    outputs = [v for v in prepared.training.graph.outputs if v.name in predicted]
    known = [value.name or "" for value in outputs]
    if not known:
        raise UsageError("the model has no output that depends on its inputs")
    if output is not None and output not in known:
        raise UsageError(f"the model has no output '{output}'; it has {', '.join(known)}")
    return output or next((v.name or "" for v in outputs if is_float(v)), known[0])
