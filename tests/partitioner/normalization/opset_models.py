"""Models written as exporters of any opset would, brought to opset 18 to 21 and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.normalization.opsets import adapt_opset, inline_functions

FLOAT = TensorProto.FLOAT


Arrays = dict[str, np.ndarray]


class Writer:
    """Writes nodes as an exporter of some opset would: settings as attributes or as inputs."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(3)

    def op(self, kind: str, *inputs: str, out: str | Sequence[str], **attributes: Any) -> str:
        names = [out] if isinstance(out, str) else list(out)
        self.nodes.append(helper.make_node(kind, inputs, names, f"{names[0]}_node", **attributes))
        return names[0]

    def weight(self, name: str, *shape: int) -> str:
        return self.constant(name, 0.4 * self._random.standard_normal(shape, np.float32))

    def constant(self, name: str, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def settings(self, since: int, out: str, **values: Sequence[int]) -> tuple[list[str], Any]:
        """Give integer settings as inputs from opset ``since`` on, before it as attributes."""
        if self.opset < since:
            return [], values
        arrays = {f"{out}.{name}": np.array(value) for name, value in values.items()}
        return [self.constant(name, array) for name, array in arrays.items()], {}

    def finish(
        self, inputs: Mapping[str, Sequence[Any]], output: str, rank: int
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "written",
            [helper.make_tensor_value_info(name, FLOAT, dims) for name, dims in inputs.items()],
            [helper.make_tensor_value_info(output, FLOAT, [None] * rank)],
            self.weights,
        )
        version = 3 if self.opset < 9 else 8 if self.opset < 22 else 13
        if version == 3:  # every initializer is an input as well
            graph.input.extend(
                helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in self.weights
            )
        imports = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=imports, ir_version=version)


def adapt(model: onnx.ModelProto) -> onnx.ModelProto:
    adapted = ir.from_proto(model)
    inline_functions(adapted)
    adapt_opset(adapted)
    proto: onnx.ModelProto = ir.to_proto(adapted)
    onnx.checker.check_model(proto)
    versions = [entry.version for entry in proto.opset_import if not entry.domain]
    assert 18 <= versions[0] <= 21
    return proto


def run(model: onnx.ModelProto, feeds: Arrays) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    outputs: list[np.ndarray] = session.run(None, feeds)
    return outputs


X = np.random.default_rng(5).standard_normal((2, 3, 4, 5), np.float32)


ROW = np.array([1.0, -2.0, 0.5], np.float32)
