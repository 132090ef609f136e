"""Write the parameters of an RNN's activation functions as ONNX Runtime's kernel reads them.

By the standard, ``activation_alpha`` and ``activation_beta`` are assigned in order to the functions
that use them, and have defaults.  ONNX Runtime's kernel of RNN reads the value at the direction's
index instead, takes a missing one as 0, and reads beyond the end of a list that is too short.  Its
kernels of LSTM and GRU follow the standard.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.graphs.traversals import list_bodies
from splitonnx.partitioner.rewrites.cells import Function, read_functions

_PARAMETERS = ("activation_alpha", "activation_beta")


def complete_activations(graph: ir.Graph) -> None:
    """Write every parameter of the functions of each RNN node, in place and in all bodies.

    Raises:
        UnsupportedModel: a function is unknown, or a node has the wrong number of functions.
    """
    for node in graph:
        for body in list_bodies(node):
            complete_activations(body)
        if node.op_type == "RNN" and not node.domain:
            _complete(node)


def _complete(node: ir.Node) -> None:
    directions = 2 if node.attributes.get_string("direction", "forward") == "bidirectional" else 1
    functions = read_functions(node, ("Tanh",), directions)
    for index, name in enumerate(_PARAMETERS):
        node.attributes.pop(name, None)
        if values := _list_values(functions, index):
            node.attributes[name] = ir.AttrFloat32s(name, values)


def _list_values(functions: Sequence[Function], index: int) -> list[float]:
    """Return a parameter's value for each direction; empty if no function has the parameter.

    A direction without it is given that of the other one.  So the list means the same by the
    standard, which skips such a direction.
    """
    values = [f.settings[index] if index < len(f.settings) else None for f in functions]
    known = [value for value in values if value is not None]
    return [known[0] if value is None else value for value in values] if known else []
