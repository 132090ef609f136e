"""List the kernels that a reduced build of ONNX Runtime needs, by a tool of onnxruntime."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

from splitonnx.runtime.engine.builds.installed import import_onnxruntime
from splitonnx.runtime.engine.stage_graphs import OperatorKernel


def list_kernels(graphs: Iterable[bytes]) -> tuple[OperatorKernel, ...]:
    """List the operators that a reduced ONNX Runtime build needs to run graphs in ORT format.

    The graphs must come from :meth:`~engines.Engine.convert`.  A tool of onnxruntime reads them.
    """
    import_onnxruntime()
    from onnxruntime.tools import ort_format_model

    types = ort_format_model.OperatorTypeUsageManager()
    found: dict[str, dict[int, set[str]]] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the tool does not close its file
        for graph in graphs:
            path = Path(folder, "stage.ort")
            path.write_bytes(graph)
            ort_format_model.OrtFormatModelProcessor(str(path), found, types).process()
    return tuple(
        OperatorKernel(
            domain=domain,
            version=version,
            operator=operator,
            types=types.get_config_entry(domain, operator) or "",
        )
        for domain, versions in sorted(found.items())
        for version, operators in sorted(versions.items())
        for operator in sorted(operators)
    )
