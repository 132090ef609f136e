"""Correct what exporters change: modes of BatchNormalization, dropout and running statistics."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx

from splitonnx.partitioner.gate.exporters import CHECKED

_TRAINING = "training_mode"


def restore_buffers(model: onnx.ModelProto, buffers: Mapping[str, np.ndarray]) -> None:
    """Set the buffers in a model to the values that they had before the export.

    ``buffers`` maps their names to these values.  The model is changed in place.  This is needed
    because the legacy exporter calls the network in training mode, which updates running
    statistics.
    """
    for tensor in model.graph.initializer:
        array = buffers.get(tensor.name)
        if array is not None and tuple(tensor.dims) == array.shape:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(dtype), tensor.name))


def train_batchnorms(model: onnx.ModelProto, training: Collection[str]) -> None:
    """Switch BatchNormalizations in a model to training mode.

    ``training`` contains the names of their running means.  The model is changed in place.  This is
    needed because the dynamo exporter writes every BatchNormalization in inference mode.
    """
    for at, node in enumerate(model.graph.node):
        is_norm = node.op_type == "BatchNormalization" and node.input[3] in training
        if not is_norm or any(a.name == _TRAINING and a.i for a in node.attribute):
            continue
        kept = [attribute for attribute in node.attribute if attribute.name != _TRAINING]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(_TRAINING, 1)])
        first = node.output[0]
        del node.output[:]
        node.output.extend([first, f"{first}.mean_{at}", f"{first}.variance_{at}"])


def turn_on_dropouts(model: onnx.ModelProto) -> None:
    """Turn on each Dropout that has no ``training_mode`` input.

    The legacy exporter omits this input for the dropout of ``scaled_dot_product_attention``.  It
    does not write any Dropout that is off in the network.  The model is changed in place.
    """
    idle = [n for n in model.graph.node if n.op_type == "Dropout" and not is_on(n)]
    if not idle:
        return
    on = onnx.numpy_helper.from_array(np.array(True), "splitonnx.dropout_is_on")
    model.graph.initializer.append(on)
    for node in idle:
        node.input.extend([""] * (2 - len(node.input)))
        del node.input[2:]
        node.input.append(on.name)


def is_on(node: onnx.NodeProto) -> bool:
    """Return whether a random operator draws numbers; a Dropout does only with a third input."""
    return node.op_type != "Dropout" or (len(node.input) > 2 and bool(node.input[2]))


def mark_checked(model: onnx.ModelProto) -> None:
    """Mark a model as compared with the network; any other metadata are deleted.

    ``check`` does not look for omissions of PyTorch's exporter in a model that has this mark.
    """
    del model.metadata_props[:]
    model.metadata_props.add(key=CHECKED, value="1")
