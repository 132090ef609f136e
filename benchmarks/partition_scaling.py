"""Does the work of `check`, `inspect` and `cut` grow as a model's nodes do?

``python benchmarks/partition_scaling.py`` prints, for each verb and kind of model (a row of plain
nodes, branches, a chain with many weights), the processor time per node (this process and that of
native code) and its growth from the smallest model to the largest.  It ends with 1 where a growth
is over the bound, or up to 20,000 plain nodes take more seconds than they may.  Where a verb
refuses a model, its sentence is printed instead.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import SplitonnxError
from splitonnx.partitioner.native import workers
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.inspections import inspect

MOST_GROWTH = 1.5
MOST_SECONDS = 30.0
"""Of processor time, for 20,000 plain nodes."""


class _Rows:
    """Nodes in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name]))
        return name

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.full(shape, 0.1, np.float32), name))
        return name

    def finish(self, last: str) -> bytes:
        values = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in ("x", last)
        ]
        graph = helper.make_graph(self.nodes, "rows", values[:1], values[1:], self.weights)
        opsets = [helper.make_opsetid("", 18)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        content: bytes = model.SerializeToString()
        return content


def build_plain(nodes: int) -> bytes:
    """One matrix, then activations in a row."""
    rows = _Rows()
    last = rows.op("MatMul", "x", rows.weight(4, 4))
    for index in range(nodes - 1):
        last = rows.op(("Relu", "Neg", "Sigmoid")[index % 3], last)
    return rows.finish(last)


def build_chain(nodes: int) -> bytes:
    """MatMul, Add and Relu in a row, each with weights of its own: many small initializers."""
    rows, last = _Rows(), "x"
    for index in range(nodes):
        if index % 3 == 2:
            last = rows.op("Relu", last)
        else:
            kind, shape = (("MatMul", (4, 4)), ("Add", (4,)))[index % 3]
            last = rows.op(kind, last, rows.weight(*shape))
    return rows.finish(last)


def build_wide(nodes: int) -> bytes:
    """Branches side by side behind one node, added up by pairs."""
    rows = _Rows()
    stem = rows.op("MatMul", "x", rows.weight(4, 4))
    ends = [rows.op("Relu", rows.op("Neg", stem)) for _ in range(nodes // 3)]
    while len(ends) > 1:
        pairs = zip(ends[::2], ends[1::2], strict=False)
        ends = [*(rows.op("Add", *pair) for pair in pairs), *ends[len(ends) & ~1 :]]
    return rows.finish(ends[0])


MODELS: Mapping[str, Callable[[int], bytes]] = {
    "chain": build_chain,
    "plain": build_plain,
    "wide": build_wide,
}
VERBS: Mapping[str, Callable[[bytes], object]] = {
    "check": lambda content: check(content, loss="mse"),
    "cut": lambda content: cut(content, at="v0", loss="mse"),
    "inspect": inspect,
}


def measure(verb: str, content: bytes) -> float:
    """Return the processor seconds that a verb takes, those of its native process among them."""
    import resource

    started = time.process_time() + _read_children(resource)
    VERBS[verb](content)
    workers._HERE.end()  # so that what it took is known
    return time.process_time() + _read_children(resource) - started


def _read_children(resource: object) -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # type: ignore[attr-defined]
    return float(used.ru_utime + used.ru_stime)


def main() -> int:
    """Measure, print, and compare with the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 5000, 20_000, 50_000])
    parser.add_argument("--verb", choices=VERBS, action="append")
    parser.add_argument("--model", choices=MODELS, action="append")
    given = parser.parse_args()
    failed = False
    print(f"{'verb':8} {'model':6} {'nodes':>7} {'seconds':>8} {'us/node':>8} {'growth':>7}")
    for verb in given.verb or VERBS:
        for model in given.model or MODELS:
            first = 0.0
            for nodes in sorted(given.nodes):
                try:
                    seconds = measure(verb, MODELS[model](nodes))
                except SplitonnxError as error:
                    print(f"{verb:8} {model:6} {nodes:7} refused: {error}", flush=True)
                    continue
                each = seconds / nodes * 1e6
                first = first or each
                growth = each / first
                failed |= growth > MOST_GROWTH
                failed |= model == "plain" and nodes <= 20_000 and seconds > MOST_SECONDS
                print(
                    f"{verb:8} {model:6} {nodes:7} {seconds:8.2f} {each:8.0f} {growth:7.2f}",
                    flush=True,
                )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
