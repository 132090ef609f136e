"""Decide whether an error in processing a node is caused by the node or by this package.

Code that handles a node assumes that the node's inputs and attributes are valid for its operator:
ranks match, a divisor is not 0, a mode exists.  Checkers do not cover all of these assumptions.  If
a node violates an assumption, Python raises an exception such as :class:`ValueError`; but a bug in
this package can raise the same exception.  So ONNX Runtime is asked to run only this node, on zeros
or ones.  If ONNX Runtime refuses the node, the error is in the model, otherwise in this package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError

from splitonnx.errors import NativeCrash, SplitonnxError, UnsupportedModel
from splitonnx.partitioner.graphs.builders import MissingOutput, UnknownType, known_array
from splitonnx.partitioner.graphs.faults import (
    FAULTS,
    describe_node,
    explain,
    find_cause,
    is_ours,
    report_mistake,
)
from splitonnx.partitioner.graphs.transcripts import write_node
from splitonnx.partitioner.native import natives
from splitonnx.partitioner.native.workers import Refused, call

_NO_NUMBER = "can be converted to"
"""Part of the message of numpy's TypeError for an array that should be a single number."""
_Arrays = Mapping[str, np.ndarray]

_BODIES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})
_MOST_ELEMENTS = 1 << 24
"""Limit of elements of an input up to which a node is run."""
_FILLINGS = (0, 1)
"""What all elements of a node's inputs are when it is run: a divisor must not be 0."""
_SIZE = 2
"""The size on which a node is run in place of each size that is not known."""
_NEWEST = 21
"""The opset of a node if it is known neither from the node nor from its graph."""
_WITHOUT_KERNEL = "NotImplemented"
"""The class of ONNX Runtime's exception for a node that no kernel of it can run."""


@contextmanager
def attribute_errors_to(
    node: ir.Node,
    work: str,
    lost: str = "is read, but nothing makes it",
    advice: str = "",
    *,
    is_valid: bool = False,
) -> Iterator[None]:
    """Convert exceptions in a ``with`` block that handles ``node`` into errors about this node.

    ``work`` describes the block in error messages: it completes the phrase "while it was ...".
    ``lost`` and ``advice`` are used in the message if an output of the node was not replaced.
    ``is_valid`` means that the node is known to be valid for its operator, because earlier passes
    handled it or this package made it.  The model is then at fault only if it is too large.

    Raises:
        UnsupportedModel: the node's inputs or attributes are not valid for its operator.
        InternalModelError: the code in the block has a bug.
    """
    subject, graph = describe_node(node), node.graph
    try:
        yield
    except UnknownType as error:
        raise UnsupportedModel(subject, error.reason, error.advice) from error
    except SplitonnxError:
        raise
    except MissingOutput as error:
        raise UnsupportedModel(subject, f"its output '{error}' {lost}", advice) from error
    except Exception as error:
        is_replaced = graph is not None and node.graph is None  # so its operator was handled
        if not is_replaced and _is_caused_by(node, find_cause(error), is_valid):
            raise UnsupportedModel(
                subject,
                f"its inputs or attributes are not what the operator takes ({explain(error)})",
                "check how the model was exported",
            ) from error
        raise report_mistake(subject, work, error) from error


def _is_caused_by(node: ir.Node, cause: BaseException, is_valid: bool) -> bool:
    """Return whether an exception was caused by invalid inputs or attributes of a node.

    If ONNX Runtime cannot be asked, the kind of the exception decides.
    """
    if isinstance(cause, EncodeError | MemoryError):
        return True  # the model is too large
    is_taken = is_valid or _is_taken(node)
    if is_taken is None:
        return _shows_values(cause) or _is_of_value(node, cause)
    return not is_taken


def _shows_values(cause: BaseException) -> bool:
    """Return whether an exception is one that invalid values usually cause.

    This includes numpy's TypeError for an array that should be a single number, and an assertion
    that a type or shape is known.
    """
    if isinstance(cause, TypeError):
        return _NO_NUMBER in str(cause)
    return isinstance(cause, (*FAULTS, AssertionError)) and not isinstance(cause, KeyError)


def _is_of_value(node: ir.Node, cause: BaseException) -> bool:
    """Return whether an exception is a ``KeyError`` whose key is the value of an attribute.

    Such a value may be a mode that does not exist.
    """
    if not isinstance(cause, KeyError):
        return False
    held = [a.value for a in node.attributes.values() if not a.is_ref()]
    return any(isinstance(value, str | int) and value in cause.args for value in held)


def _is_taken(node: ir.Node) -> bool | None:
    """Return whether ONNX Runtime runs a node alone, or ``None`` if it cannot be asked.

    It is enough if the node runs on one of :data:`_FILLINGS`.
    """
    try:
        asked = _write(node)
    except (*FAULTS, TypeError) as error:
        return True if is_ours(error) else None  # onnx cannot hold what the node has
    if asked is None:
        return None
    content, batches = asked
    found = [_run(content, batch, describe_node(node)) for batch in batches]
    return None if None in found else any(found)


def _run(content: bytes, batch: _Arrays, subject: str) -> bool | None:
    """Return whether a model runs, or ``None`` if ONNX Runtime has no kernel for it."""
    try:
        call(natives.run_session, subject, content, [natives.encode_arrays(batch)], "none")
    except Refused as error:
        return None if error.kind == _WITHOUT_KERNEL else False
    except NativeCrash:
        return False
    return True


def _write(node: ir.Node) -> tuple[bytes, list[_Arrays]] | None:
    """Write a model with only one node, and batches of inputs for it.

    Constant inputs have their contents.  Return ``None`` for a node whose inputs are not all of a
    known type and rank, or whose attributes refer to the graph around it.
    """
    if any(own.is_ref() or own.type in _BODIES for own in node.attributes.values()):
        return None
    names = ["" if value is None else f"i{index}" for index, value in enumerate(node.inputs)]
    pairs = zip(names, node.inputs, strict=True)
    given = {name: value for name, value in pairs if value is not None}
    constants = {name: known_array(value) for name, value in given.items()}
    stored = {name: array for name, array in constants.items() if array is not None}
    open_inputs = {name: value for name, value in given.items() if name not in stored}
    if not all(_is_small(value) for value in open_inputs.values()):
        return None
    outputs = ["" if v.name == "" else f"o{index}" for index, v in enumerate(node.outputs)]
    graph = onnx.helper.make_graph(
        [write_node(node, names, outputs)],
        "node",
        [_declare(name, value) for name, value in open_inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs if name],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=_list_opsets(node), ir_version=10)
    batches: list[_Arrays] = [
        {name: np.full(_size(v), filling, _read_dtype(v)) for name, v in open_inputs.items()}
        for filling in _FILLINGS
    ]
    return model.SerializeToString(), batches


def _is_small(value: ir.Value) -> bool:
    """Return whether a value's type and rank are known and it has few elements."""
    if value.dtype in (None, ir.DataType.STRING) or value.shape is None:
        return False
    return math.prod(_size(value)) <= _MOST_ELEMENTS


def _size(value: ir.Value) -> list[int]:
    """Return a size for a value that has a rank."""
    return [dim if isinstance(dim, int) else _SIZE for dim in value.shape or ()]


def _declare(name: str, value: ir.Value) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(_read_dtype(value))
    return onnx.helper.make_tensor_value_info(name, kind, _size(value))


def _read_dtype(value: ir.Value) -> np.dtype[Any]:
    assert value.dtype is not None
    return value.dtype.numpy()


def _list_opsets(node: ir.Node) -> list[onnx.OperatorSetIdProto]:
    imports = dict(node.graph.opset_imports) if node.graph is not None else {}
    versions = {node.domain: 1, "": _NEWEST} | imports
    if node.version is not None:
        versions[node.domain] = node.version
    return [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]
