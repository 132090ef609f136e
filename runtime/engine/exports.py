"""Export of a party's folder for mobile apps, with stage graphs in ORT format.

ORT format is ONNX Runtime's own file format.  ONNX Runtime's mobile packages can load it, and it is
the only format that reduced builds (with only a few operators) can load.  The exported part works
with the same server as the original: it has the same digest and weights, and only the graph files
differ.  The export also lists the operators that a reduced build needs, in the format that ONNX
Runtime's build scripts read.

This module looks at the operators and sizes of graphs, but not at what they compute.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from splitonnx.bundles import WEIGHTS, PartyBundle
from splitonnx.errors import BundleError, FormatError, NotExportable
from splitonnx.graph_limits import STAGE
from splitonnx.manifests import PartyManifest
from splitonnx.names import EVALUATE, PREDICT, TRAINING, WEIGH
from splitonnx.operators import TRAINING_ONLY
from splitonnx.outputs import check_place
from splitonnx.runtime.engine.builds.installed import installed_runtime
from splitonnx.runtime.engine.builds.kernel_lists import list_kernels
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.stage_graphs import OperatorKernel
from splitonnx.runtime.gate import schemas
from splitonnx.runtime.gate.gates import check_graph
from splitonnx.runtime.gate.protobufs import Place, Reader
from splitonnx.states import STATE

OPERATORS = "required_operators.config"
"""File name of the list of required operators.

Pass the file to ONNX Runtime's build with ``--include_ops_by_config``.
"""
OPERATORS_AND_TYPES = "required_operators_and_types.config"
"""File name of the list of required operators and their element types.

For use with ``--enable_reduced_operator_type_support`` of ONNX Runtime's build.
"""
OLDEST_RUNTIME = "1.19"
"""The oldest ONNX Runtime whose mobile packages have every operator and opset that bundles use.

Older versions also have reduced packages, but only for opsets 12 to 15.
"""

_ONNX, _ORT = ".onnx", ".ort"


@dataclass(frozen=True, kw_only=True)
class ExportedGraph:
    """An exported stage graph.

    ``nodes`` is its number of nodes.  ``onnx_bytes`` is the size of the original graph, and
    ``ort_bytes`` is its size in ORT format.
    """

    name: str
    nodes: int
    onnx_bytes: int
    ort_bytes: int


@dataclass(frozen=True, kw_only=True)
class Export:
    """The result of an export: where it was written, which operators it needs and how large it is.

    ``kernels`` are the operators that a reduced build needs.  ``weights_bytes`` and ``state_bytes``
    are the sizes of the tensor files; ``state_bytes`` is 0 before any training.  ``converter`` is
    the version of ONNX Runtime that wrote the graphs.
    """

    path: str
    party: str
    digest: str
    graphs: tuple[ExportedGraph, ...]
    weights_bytes: int
    state_bytes: int
    kernels: tuple[OperatorKernel, ...]
    converter: str
    oldest_runtime: str = OLDEST_RUNTIME

    @property
    def total_bytes(self) -> int:
        """Return the size of everything that an app ships: graphs, weights and state.

        The lists of operators are not shipped and not counted.
        """
        graphs = sum(graph.ort_bytes for graph in self.graphs)
        return graphs + self.weights_bytes + self.state_bytes


def export(
    source: str | Path, target: str | Path | None = None, *, overwrite: bool = False
) -> Export:
    """Export a party's folder for mobile apps.

    ``source`` is not changed.  The export is written atomically to ``target``, by default a folder
    next to ``source`` with the suffix ``-mobile``.  It includes the weights and the outcome of
    training, but no checkpoints of interrupted runs.  ``overwrite`` allows an earlier export to be
    replaced; anything else is never overwritten.

    Each graph is loaded into the installed ONNX Runtime, to check that there is a kernel for every
    operator, its opset and its element types.  The mobile packages contain the same kernels, so
    they can also run the graph.

    Raises:
        NotExportable: a graph has operators that only onnxruntime-training can run.
        BundleError, FormatError: the folder cannot be used, or the export cannot be written.
        ForbiddenGraph, StageFailed: a graph is not allowed in a bundle, or cannot be loaded.
        MissingExtra: ONNX Runtime is not installed.
    """
    place = choose_place(source) if target is None else Path(target)
    _check_place(place, overwrite=overwrite)  # before the work rather than after it
    party = PartyBundle.load(source)
    if _is_export(party.manifest):
        raise BundleError(str(source), "its graphs are in ORT format already")
    counts = {name: count_operators(name, graph) for name, graph in party.graphs.items()}
    _refuse_training(party.manifest, counts)
    converted = _convert(party)
    kernels = list_kernels(converted.graphs.values())
    lists = {
        OPERATORS: _list_operators(kernels, converted.graphs, with_types=False),
        OPERATORS_AND_TYPES: _list_operators(kernels, converted.graphs, with_types=True),
    }
    converted.save(place, overwrite=overwrite, beside=lists)
    return Export(
        path=str(place),
        party=party.manifest.party,
        digest=party.manifest.digest,
        graphs=tuple(
            ExportedGraph(
                name=_rename(name),
                nodes=counts[name].total(),
                onnx_bytes=len(graph),
                ort_bytes=len(converted.graphs[_rename(name)]),
            )
            for name, graph in party.graphs.items()
        ),
        weights_bytes=(place / WEIGHTS).stat().st_size,
        state_bytes=0 if party.trained is None else (place / STATE).stat().st_size,
        kernels=kernels,
        converter=str(installed_runtime()),
    )


def choose_place(source: str | Path) -> Path:
    """Return the default folder for an export: next to its source, with the suffix ``-mobile``.

    Raises:
        BundleError: ``source`` is not a valid path of a party's folder.
    """
    try:
        folder = Path(source).resolve()
    except (OSError, ValueError) as error:  # a null byte in the name, say
        raise BundleError(str(source), f"it cannot be read: {error}") from error
    if not folder.name:
        raise BundleError(str(source), "it is not a party's folder")
    return folder.with_name(f"{folder.name}-mobile")


def _check_place(place: Path, *, overwrite: bool) -> None:
    try:
        check_place(place)
    except OSError as error:
        raise BundleError(str(place), f"it cannot be written: {error.strerror}") from error
    if not place.exists():
        return
    if not overwrite:
        raise BundleError(str(place), "it exists already; choose another place or overwrite")
    try:
        stands = _is_export(PartyBundle.load(place).manifest)
    except (BundleError, FormatError):
        stands = False
    if not stands:
        raise BundleError(str(place), "it is not an export, so it is not overwritten")


def _convert(party: PartyBundle) -> PartyBundle:
    engine = Engine()
    exact = _list_exact(party.manifest)
    graphs = {
        _rename(name): engine.convert(name.removesuffix(_ONNX), graph, training=name in exact)
        for name, graph in party.graphs.items()
    }
    phases = tuple(
        msgspec.structs.replace(
            phase,
            stages=tuple(
                msgspec.structs.replace(stage, graph=_rename(stage.graph)) for stage in phase.stages
            ),
        )
        for phase in party.manifest.phases
    )
    files = {name: hashlib.sha256(graph).hexdigest() for name, graph in graphs.items()}
    manifest = msgspec.structs.replace(party.manifest, phases=phases, files=files)
    return replace(party, manifest=manifest, graphs=graphs)


def _rename(graph: str) -> str:
    return graph.removesuffix(_ONNX) + _ORT


def _is_export(manifest: PartyManifest) -> bool:
    return bool(manifest.files) and all(name.endswith(_ORT) for name in manifest.files)


def _list_exact(manifest: PartyManifest) -> set[str]:
    """List the graphs that must run exactly as they are, without optimization."""
    if manifest.target != TRAINING:
        return set()
    trained = (phase for phase in manifest.phases if phase.name not in (PREDICT, EVALUATE, WEIGH))
    return {stage.graph for phase in trained for stage in phase.stages}


def _refuse_training(manifest: PartyManifest, counts: dict[str, Counter[str]]) -> None:
    for name, operators in counts.items():
        if foreign := sorted(operators.keys() & TRAINING_ONLY):
            raise NotExportable(name, foreign, manifest.party)


def count_operators(name: str, graph: bytes) -> Counter[str]:
    """Count the nodes of a graph by operator, including nodes inside If, Loop and Scan.

    Raises:
        ForbiddenGraph: the graph is not allowed in a bundle.
    """
    check_graph(name.removesuffix(_ONNX), graph)
    reader = Reader(graph, max_fields=STAGE.fields)
    places = [(start, stop) for field, start, stop in _read_model(reader) if field == "graph"]
    found: Counter[str] = Counter()
    while places:
        for field, start, stop in reader.read(places.pop(), schemas.GRAPH):
            if field == "node":
                operator, bodies = _read_node(reader, (start, stop))
                found[operator] += 1
                places += bodies
    return found


def _read_model(reader: Reader) -> Iterator[tuple[str, int, int]]:
    return reader.read((0, len(reader.content)), schemas.MODEL)


def _read_node(reader: Reader, place: Place) -> tuple[str, list[Place]]:
    operator, bodies = "", []
    for field, start, stop in reader.read(place, schemas.NODE):
        if field == "operator":
            operator = reader.read_text((start, stop), STAGE.name_bytes)
        elif field == "attribute":
            inner = reader.read((start, stop), schemas.ATTRIBUTE)
            bodies += [(start, stop) for field, start, stop in inner if field == "graph"]
    return operator, bodies


def _list_operators(
    kernels: Iterable[OperatorKernel], graphs: Iterable[str], *, with_types: bool
) -> bytes:
    """List the operators that a build needs, with one line per domain and opset version."""
    lines = ["# Generated by splitonnx export from:", *(f"# - {name}" for name in sorted(graphs))]
    groups: dict[tuple[str, int], list[str]] = {}
    for kernel in kernels:
        entry = kernel.operator + (kernel.types if with_types else "")
        groups.setdefault((kernel.domain, kernel.version), []).append(entry)
    lines += [
        f"{domain};{version};{','.join(group)}" for (domain, version), group in groups.items()
    ]
    return "\n".join([*lines, ""]).encode()
