"""Add low-rank adapters (LoRA) to a model, which are then trained in place of its weights.

The formula is in :mod:`adapters`.  A starts with random numbers and B with zeros, as in PEFT, so a
model that was just adapted computes what it did before.  Only weights of MatMul and Gemm get
adapters.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel, UsageError, count_some, list_some
from splitonnx.outputs import check_output
from splitonnx.partitioner.adapter_files import read_adapters
from splitonnx.partitioner.adapter_layers import Finding, Layer, examine, find_layers
from splitonnx.partitioner.adapters import Adapter, Note, read_factor, read_note, write_note
from splitonnx.partitioner.gate.gates import ModelSource, open_model
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.traversals import list_nodes
from splitonnx.partitioner.model_files import serialize_model, write_model
from splitonnx.partitioner.normalization.weights import list_stored

RANK = 8
"""The default rank, as in PEFT."""
_OLDEST_OPSET = 7
"""The first opset whose Mul takes a scalar without an attribute that says so."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What :func:`write_adapted` wrote.

    ``weights`` names the weights that have adapters, ``parameters`` counts the adapters' elements,
    and ``size`` is the number of bytes written.
    """

    weights: tuple[str, ...]
    parameters: int
    size: int


def adapt(
    model: ModelSource,
    *,
    lora: str | Sequence[str] = (),
    rank: int | None = None,
    alpha: float | None = None,
    seed: int | None = None,
    adapters: str | Path | None = None,
) -> bytes:
    """Add low-rank adapters (LoRA) to a model, and return the adapted model.

    ``cut`` and ``train --local`` then train the adapters only.  The adapted model computes what
    ``model`` does until the adapters are trained.

    Args:
        model: a path, the bytes of an ONNX model, or a loaded model, which is not changed.
        lora: regular expressions (``re.search``) for the names of weights, of the MatMul and Gemm
            nodes that use them, or of the modules that PyTorch's exporter noted for these nodes.
        rank: the number of columns of A and of rows of B; by default 8.
        alpha: the adapters' product is multiplied by ``alpha / rank``; by default ``alpha`` is the
            rank, so this factor is 1.
        seed: the seed of the random numbers in A; by default 0.
        adapters: a safetensors file of adapters to put into the model, instead of new ones.  Then
            ``lora``, ``rank`` and ``seed`` must not be given, and ``alpha`` only if the file does
            not say it.

    Raises:
        ModelError: the model cannot be read, or has adapters already; or ``lora`` finds no weight
            that can have an adapter, or ``adapters`` does not fit the model.
        FormatError, UnusableFile: ``adapters`` cannot be read.
        UsageError: arguments contradict each other or are out of range; or the model is too large
            for one file, and :func:`write_adapted` can write two.
    """
    adapted = _adapt(model, lora, rank, alpha, seed, adapters)
    return serialize_model(adapted, "the adapted model", "write_adapted or `splitonnx adapt`")


def write_adapted(
    model: ModelSource,
    path: str | Path,
    *,
    lora: str | Sequence[str] = (),
    rank: int | None = None,
    alpha: float | None = None,
    seed: int | None = None,
    adapters: str | Path | None = None,
    overwrite: bool = False,
) -> Adaptation:
    """Add low-rank adapters to a model like :func:`adapt`, and write the model to ``path``.

    The file holds all weights.  If they are too large for one ONNX file, they are written to a
    second file, whose name is ``path`` with ``.data`` appended.

    Raises:
        UnwritableFile: a file cannot be written, or exists and ``overwrite`` is false.
        ModelError, FormatError, UnusableFile, UsageError: as raised by :func:`adapt`.
    """
    target = Path(path)
    check_output(target, overwrite=overwrite)
    adapted = _adapt(model, lora, rank, alpha, seed, adapters)
    note = read_note(adapted)
    assert note is not None
    tensors = [adapted.graph.initializers[name].const_value for name in note.names]
    parameters = sum(tensor.size for tensor in tensors if tensor is not None)
    size = write_model(adapted, target, overwrite=overwrite)
    weights = tuple(adapter.weight for adapter in note.adapters)
    return Adaptation(weights=weights, parameters=parameters, size=size)


def _adapt(
    source: ModelSource,
    lora: str | Sequence[str],
    rank: int | None,
    alpha: float | None,
    seed: int | None,
    adapters: str | Path | None,
) -> ir.Model:
    patterns = (lora,) if isinstance(lora, str) else tuple(lora)
    _check_arguments(patterns, rank, alpha, seed, adapters)
    model = open_model(source)
    with attribute_errors_to_pass("given adapters"):
        _check_model(model)
        if adapters is None:
            return _add_new(model, patterns, rank or RANK, alpha, seed or 0)
        return _add_saved(model, Path(adapters), alpha)


def _check_arguments(
    patterns: Sequence[str],
    rank: int | None,
    alpha: float | None,
    seed: int | None,
    adapters: str | Path | None,
) -> None:
    if bool(patterns) is (adapters is not None):
        raise UsageError(
            "say either which weights get new adapters, with --lora REGEX (lora=), or which saved "
            "ones to put into the model, with --adapters FILE (adapters=)"
        )
    for option, given in (("--rank", rank), ("--seed", seed)):
        if adapters is not None and given is not None:
            raise UsageError(
                f"{option} is for new adapters, and those of --adapters are not; leave it out"
            )
    if rank is not None and rank < 1:
        raise UsageError(f"--rank must be at least 1, not {rank}")
    if seed is not None and seed < 0:
        raise UsageError(f"--seed must be at least 0, not {seed}")
    if alpha is not None and not 0 < alpha < math.inf:
        raise UsageError(f"--alpha must be above 0 and finite, not {alpha:g}")


def _check_model(model: ir.Model) -> None:
    if read_note(model) is not None:
        raise UnsupportedModel(
            "the model", "it has adapters already", "fold them with splitonnx merge --fold first"
        )
    opset = model.graph.opset_imports.get("", _OLDEST_OPSET)
    if opset < _OLDEST_OPSET:
        raise UnsupportedModel(
            "the model",
            f"it has opset {opset}, and adapters need {_OLDEST_OPSET} or later",
            "export it again, or convert it with onnx.version_converter",
        )


def _add_new(
    model: ir.Model, patterns: Sequence[str], rank: int, alpha: float | None, seed: int
) -> ir.Model:
    """Add new adapters to the weights that the patterns find."""
    found = find_layers(model.graph, patterns)
    _warn_of_others(found)
    matrices = {name: _draw(name, layer.sizes, rank, seed) for name, layer in found.layers.items()}
    return _add(model, found.layers, matrices, rank if alpha is None else alpha)


def _add_saved(model: ir.Model, path: Path, alpha: float | None) -> ir.Model:
    """Add the adapters in a file to the weights that it names."""
    saved = read_adapters(path)
    if saved.alpha is None and alpha is None:
        raise UsageError(
            f"{path} does not say the adapters' alpha; give it with --alpha (alpha=), which in "
            "PEFT's adapter_config.json is lora_alpha"
        )
    if None not in (saved.alpha, alpha) and saved.alpha != alpha:
        raise UsageError(f"--alpha is {alpha:g}, but {path} says {saved.alpha:g}; leave it out")
    layers: dict[str, Layer] = {}
    matrices: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    stored = dict(list_stored(model.graph))
    for module, (first, second) in saved.matrices.items():
        name = next((n for n in (f"{module}.weight", module) if n in stored), None)
        if name is None:
            raise UnsupportedModel(
                str(path), f"the model has no weight '{module}.weight' or '{module}'",
                f"it has {list_some(stored)}",
            )  # fmt: skip
        if name in layers:
            raise UnsupportedModel(str(path), f"it holds two adapters of '{name}'")
        layer = examine(*stored[name], model.graph)
        if isinstance(layer, str):
            raise UnsupportedModel(str(path), f"'{name}' can have no adapter: {layer}")
        given = (len(first), second.shape[1])
        if given != layer.sizes:
            raise UnsupportedModel(
                str(path),
                f"the adapter of '{name}' is for {given[0]} inputs and {given[1]} outputs, but "
                f"the weight has {layer.sizes[0]} and {layer.sizes[1]}",
            )
        layers[name], matrices[name] = layer, (first, second)
    known = saved.alpha if saved.alpha is not None else alpha
    assert known is not None
    return _add(model, layers, matrices, known)


def _warn_of_others(found: Finding) -> None:
    """Log a warning for the matrices that were found but get no adapter, for each reason."""
    groups = defaultdict[str, list[str]](list)
    for name, reason in found.reasons.items():
        groups[reason].append(name)
    for reason, names in groups.items():
        _log.warning("no adapter for %s: %s", count_some(names), reason)


def _draw(name: str, sizes: tuple[int, int], rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrices that an adapter starts with.

    A is uniform between -1 / sqrt(inputs) and 1 / sqrt(inputs), and B is zero.  This is PEFT's
    default, ``kaiming_uniform_(A, a=sqrt(5))``.  The numbers depend on the seed and the weight's
    name, and not on the other weights.
    """
    inputs, outputs = sizes
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    bound = 1 / math.sqrt(max(inputs, 1))
    first = random.uniform(-bound, bound, (inputs, rank))
    return first, np.zeros((rank, outputs))


def _add(
    model: ir.Model,
    layers: Mapping[str, Layer],
    matrices: Mapping[str, tuple[np.ndarray, np.ndarray]],
    alpha: float,
) -> ir.Model:
    graph = model.graph
    taken = {value.name or "" for node in list_nodes(graph) for value in node.outputs}
    taken |= {value.name or "" for value in graph.inputs} | set(graph.initializers)
    adapters = []
    for name, layer in layers.items():
        dtype, stem = layer.tensor.dtype, name.removesuffix(".weight")
        first, second = (
            _store(graph, dtype, _claim(f"{stem}.lora_{letter}", taken), matrix)
            for letter, matrix in zip("AB", matrices[name], strict=True)
        )
        scale = alpha / matrices[name][0].shape[1]
        for node in layer.products:
            number = np.array(scale * read_factor(node))
            scaling = _store(graph, dtype, _claim(f"{stem}.lora_scale", taken), number)
            _add_to_product(graph, node, (first, scaling, second), taken)
        adapters.append(Adapter(weight=name, first=first.name or "", second=second.name or ""))
    write_note(model, Note(alpha=alpha, adapters=tuple(adapters)))
    return model


def _claim(name: str, taken: set[str]) -> str:
    """Return ``name``, or a name like it that the graph does not have yet."""
    free = next(n for n in _number(name) if n not in taken)
    taken.add(free)
    return free


def _number(name: str) -> Iterator[str]:
    yield name
    count = 1
    while True:
        yield f"{name}_{count}"
        count += 1


def _store(graph: ir.Graph, dtype: ir.DataType, name: str, array: np.ndarray) -> ir.Value:
    """Add an initializer to the graph."""
    held = array.astype(dtype.numpy())
    tensor = ir.tensor(held, dtype=dtype, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(dtype), shape=ir.Shape(held.shape), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _add_to_product(
    graph: ir.Graph, node: ir.Node, factors: Sequence[ir.Value], taken: set[str]
) -> None:
    """Add an adapter's product to the result of a node; the sum takes over the result's name."""
    result = node.outputs[0]
    name = result.name or ""
    stem = node.name or name
    made = []
    value = node.inputs[0]
    for kind, factor, part in zip(
        ("MatMul", "Mul", "MatMul"), factors, ("lora_A", "lora_scale", "lora_B"), strict=True
    ):
        output = ir.Value(name=_claim(f"{name}.{part}", taken))
        made.append(ir.Node("", kind, [value, factor], outputs=[output], name=f"{stem}/{part}"))
        value = output
    total = ir.Value(name=name, type=result.type, shape=result.shape)
    added = ir.Node("", "Add", [result, value], outputs=[total], name=f"{stem}/lora")
    result.replace_all_uses_with(total, replace_graph_outputs=True)
    added.replace_input_with(0, result)
    result.name = _claim(f"{name}.lora_base", taken)
    graph.insert_after(node, [*made, added])
