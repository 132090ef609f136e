"""Functions that call native code of onnx and onnxruntime-training; models are passed as bytes.

The native code assumes that a model is well-formed, but no checker verifies all of its assumptions,
so a malformed model can crash or corrupt the process.  The functions therefore run in a separate
process.  :mod:`workers` starts that process, which runs :mod:`main`, and sends it requests.

This is the only module of the partitioner that imports onnxruntime-training.  It uses only the
pybind layer of version 1.19.2, so torch is not needed.  The functions do not check their arguments.
"""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx

from splitonnx.imports import leaving_out
from splitonnx.partitioner.native.stored_tensors import (
    Stored,
    declare_weights,
    decode_stored,
    fill_weights,
)
from splitonnx.session_settings import EXACT_SETTINGS

_AGAIN = 0.5
"""Seconds of processor time after which a time limit takes effect again, if it was discarded."""
_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError, ValueError
)  # fmt: skip
"""Exceptions that Python code raises over wrong values or by mistake."""
_NATIVE = "splitonnx.partitioner.native"
_CORRECTIONS = [
    f"{_NATIVE}.{name}" for name in ("corrections", "convolutions", "poolings", "recurrent_layers")
]


class CorrectionFailed(Exception):
    """Raised if an operator of :mod:`corrections` fails."""


class StockRuntime(Exception):
    """Raised if the installed ONNX Runtime is not onnxruntime-training."""


def check_form(content: bytes) -> None:
    """Check a model with onnx's checker and type inference.

    onnx raises an exception if the model is malformed or if its types contradict each other.
    """
    onnx.checker.check_model(content)
    onnx.shape_inference.infer_shapes(content, check_type=True, strict_mode=False)


def infer_shapes(content: bytes, check_type: bool) -> bytes:
    """Return the model with the types and shapes that onnx infers.

    Contents of tensors that nodes compute are not used (onnx's ``data_prop`` is off).
    ``check_type`` means that onnx raises an exception if types contradict each other.
    """
    inferred = onnx.shape_inference.infer_shapes(content, check_type=check_type)
    made: bytes = inferred.SerializeToString()
    return made


def infer_node(
    node: bytes, types: Mapping[str, bytes], data: Mapping[str, bytes], opset: int
) -> dict[str, bytes]:
    """Infer the types of a node's outputs with onnx, and return them by output name.

    ``types`` contains the types of the inputs by name, and ``data`` contains the values of those
    inputs that are known.  ``opset`` is the opset of the node.
    """
    proto = onnx.NodeProto.FromString(node)
    made = onnx.shape_inference.infer_node_outputs(
        onnx.defs.get_schema(proto.op_type, opset, ""),
        proto,
        {name: onnx.TypeProto.FromString(kind) for name, kind in types.items()},
        {name: onnx.TensorProto.FromString(tensor) for name, tensor in data.items()},
        opset_imports=[onnx.helper.make_opsetid("", opset)],
    )
    return {name: kind.SerializeToString() for name, kind in made.items()}


def define(node: bytes, types: Sequence[bytes], version: int, defined: int) -> bytes:
    """Return the ONNX function that defines the operator of ``node``.

    ``version`` is the opset of the node, and ``defined`` is the opset of the operators in the
    function.  ``types`` contains the types of the node's inputs.
    """
    kind = onnx.NodeProto.FromString(node).op_type
    schema: Any = onnx.defs.get_schema(kind, version, "")  # onnx's stubs lack its bodies
    body: bytes = schema.get_context_dependent_function_with_opset_version(defined, node, types)
    return body


def optimize(content: bytes, parameters: Sequence[str]) -> bytes:
    """Optimize a model with onnxruntime-training, and return the result.

    The gradient builder expects a model that was optimized in this way.  ``parameters`` contains
    the names of the trained parameters.
    """
    optimized: bytes = _import_builder().get_optimized_model(
        content, set(parameters), _make_options()
    )
    return optimized


def build_gradients(
    content: bytes, parameters: Sequence[str], loss: str, ends: Sequence[str] = ()
) -> bytes:
    """Return a model that also computes the gradients with respect to ``parameters``.

    ``parameters`` contains names of values.  ``loss`` is the name of the scalar to differentiate,
    or empty.  The model itself provides the gradients of the values named in ``ends``, which are
    named ``<end>_grad``, and they are passed on.
    """
    options, wanted, sources = _make_options(), set(parameters), {*ends, *filter(None, [loss])}
    builder = _import_builder().GradientGraphBuilder(content, sources, wanted, loss, options)
    builder.build()
    joint: bytes = builder.get_model()
    return joint


def list_types(content: bytes) -> dict[str, str]:
    """Return the type of each output of a model by name, such as ``tensor(float)``.

    The types are written as ONNX Runtime writes them.
    """
    session = import_onnxruntime().InferenceSession(
        content, _make_options(), providers=["CPUExecutionProvider"]
    )
    return {output.name: output.type for output in session.get_outputs()}


def run_session(
    content: bytes,
    batches: Sequence[Mapping[str, bytes | Stored]],
    level: str,
    weights: Mapping[str, Stored] | None = None,
) -> list[dict[str, bytes]]:
    """Run a serialized model with ONNX Runtime, and return its outputs for each batch.

    Inputs and outputs map names to serialized tensors; outputs of other types are left out.  An
    input can also be a stored tensor.  ``weights`` are initializers that the model lacks.
    ``level`` is the level of graph optimizations: ``none``, ``basic``, ``all`` or ``usual``.  Level
    ``usual`` is ``all`` without splitonnx's own settings, as in a session that a user makes.
    """
    onnxruntime = import_onnxruntime()
    levels = onnxruntime.GraphOptimizationLevel
    options = _make_options()
    options.graph_optimization_level = {
        "none": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "all": levels.ORT_ENABLE_ALL,
        "usual": levels.ORT_ENABLE_ALL,
    }[level]
    for entry in EXACT_SETTINGS.items() if level != "usual" else ():
        options.add_session_config_entry(*entry)
    if weights:
        content = declare_weights(content, weights)
        values = [
            onnxruntime.OrtValue.ortvalue_from_numpy(decode_stored(w)) for w in weights.values()
        ]
        options.add_external_initializers(list(weights), values)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    results = []
    for batch in batches:
        given = decode_arrays(batch)  # kept until then: an output may be an input's memory
        results.append(_encode(names, session.run(names, given)))
    return results


def run_reference(
    content: bytes,
    batches: Sequence[Mapping[str, bytes | Stored]],
    seconds: float,
    weights: Mapping[str, Stored] | None = None,
) -> list[dict[str, bytes]]:
    """Run a serialized model with onnx's reference evaluator; return its outputs for each batch.

    Inputs, outputs and weights have the same form as those of :func:`run_session`.

    Raises:
        TimeoutError: all batches together take more than ``seconds`` of processor time.  There is
            no such limit on Windows.
        RuntimeError: the evaluator fails because of a mistake in its own code.
        CorrectionFailed: an operator of :mod:`corrections` fails.
    """
    from onnx.reference import ReferenceEvaluator

    from splitonnx.partitioner.native.corrections import CORRECTIONS

    with _limit_time(seconds), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of what overflows
        model = fill_weights(content, weights or {})
        evaluator = ReferenceEvaluator(model, new_ops=list(CORRECTIONS))
        names = evaluator.output_names
        try:
            return [_encode(names, evaluator.run(None, decode_arrays(batch))) for batch in batches]
        except _FAILURES as error:
            cause = error.__cause__ or error  # the evaluator wraps some
            told = f"{type(cause).__name__}: {cause}"
            if place := _find_correction(cause):
                raise CorrectionFailed(f"{told}, in {place}") from error
            if isinstance(error, AttributeError | NameError | TypeError):
                raise RuntimeError(told) from error  # its own mistake, not ours
            raise


def _find_correction(error: BaseException) -> str:
    """Return the line of :mod:`corrections` that raised an exception, or an empty string.

    numpy's own lines do not count.
    """
    lines = [
        (str(frame.f_globals.get("__name__", "")), frame.f_code.co_name, number)
        for frame, number in traceback.walk_tb(error.__traceback__)
    ]
    module, name, number = [line for line in lines if line[0].partition(".")[0] != "numpy"][-1]
    if module not in _CORRECTIONS:
        return ""
    return f"line {number} of {module.rpartition('.')[2]} ({name})"


@contextmanager
def _limit_time(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` in a ``with`` block that takes more processor time than ``seconds``.

    The error is raised again from time to time, because Python discards an exception that is raised
    in a destructor or in a callback of the garbage collector.  There is no such limit on Windows.
    """
    if sys.platform == "win32":
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def decode_arrays(tensors: Mapping[str, bytes | Stored]) -> dict[str, np.ndarray]:
    """Decode arrays from serialized ``TensorProto`` messages, or from stored tensors."""
    return {
        name: onnx.numpy_helper.to_array(onnx.TensorProto.FromString(tensor))
        if isinstance(tensor, bytes)
        else decode_stored(tensor)
        for name, tensor in tensors.items()
    }


def encode_arrays(arrays: Mapping[str, Any]) -> dict[str, bytes]:
    """Encode arrays as serialized ``TensorProto`` messages to send them to another process.

    Values that are not arrays, such as sequences, are left out.
    """
    return {
        name: onnx.numpy_helper.from_array(np.asarray(value)).SerializeToString()
        for name, value in arrays.items()
        if isinstance(value, np.ndarray | np.generic)
    }


def _encode(names: Sequence[str], values: Any) -> dict[str, bytes]:
    return encode_arrays(dict(zip(names, values, strict=True)))


def import_onnxruntime() -> Any:
    """Import ONNX Runtime, without its Python code for training, and return it."""
    with leaving_out("onnxruntime.training"):  # its Python code, which takes long to import
        import onnxruntime
    return onnxruntime


def _import_builder() -> Any:
    bindings = import_onnxruntime().capi._pybind_state
    if not hasattr(bindings, "GradientGraphBuilder"):
        raise StockRuntime("it has no GradientGraphBuilder")
    return bindings


def _make_options() -> Any:
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other threads' time
    return options


NATIVES: Mapping[str, tuple[Callable[..., Any], str]] = {
    "build_gradients": (build_gradients, "onnxruntime-training's gradient builder"),
    "check_form": (check_form, "onnx's checker"),
    "define": (define, "onnx's definition of an operator"),
    "infer_node": (infer_node, "onnx's inference of shapes"),
    "infer_shapes": (infer_shapes, "onnx's inference of shapes"),
    "list_types": (list_types, "ONNX Runtime"),
    "optimize": (optimize, "onnxruntime-training's optimizer"),
    "run_reference": (run_reference, "onnx's reference evaluator"),
    "run_session": (run_session, "ONNX Runtime"),
}
"""Maps a function's name to the function and to the name of the native code that it runs."""
