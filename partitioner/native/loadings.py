"""Find the node with which ONNX Runtime cannot load a model, since it names none.

A kernel checks the attributes of its node when a session is made, before anything is run.
"""

from __future__ import annotations

import onnx

from splitonnx.kernel_errors import UNLOADABLE, describe_kernel_error
from splitonnx.partitioner.native import natives
from splitonnx.partitioner.native.workers import Refused, call


def is_unloadable(error: Exception) -> bool:
    """Return whether an error says that a kernel refuses the attributes of its node."""
    return describe_kernel_error(str(error)).startswith(UNLOADABLE)


def find_unloadable(content: bytes, subject: str) -> onnx.NodeProto | None:
    """Return the first node of a serialized model that ONNX Runtime cannot load.

    Return ``None`` if there is none.  A node in a body is found as the node that holds the body.
    ``subject`` names the model in error messages.

    Raises:
        NativeCrash: ONNX Runtime ends its process over the model.
    """
    model = onnx.ModelProto.FromString(content)
    loaded, refused = 0, len(model.graph.node)
    if _loads(model, refused, subject):
        return None
    while refused - loaded > 1:
        middle = (loaded + refused) // 2
        if _loads(model, middle, subject):
            loaded = middle
        else:
            refused = middle
    found: onnx.NodeProto = model.graph.node[refused - 1]
    return found


def _loads(model: onnx.ModelProto, count: int, subject: str) -> bool:
    """Return whether ONNX Runtime loads a model that ends with its node number ``count``."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    del part.graph.node[count:]
    del part.graph.output[:]
    made = [name for node in part.graph.node[-1:] for name in node.output if name]
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    try:
        call(natives.run_session, subject, part.SerializeToString(), [], "none")
    except Refused as error:
        return not is_unloadable(error)
    return True
