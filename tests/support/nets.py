"""Models under construction, a node at a time, with weights drawn from one seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Arrays = dict[str, np.ndarray]

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


class Net:
    """A model under construction: nodes in a row, weights drawn from one seed."""

    def __init__(self, opset: int = 18) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(len(self.nodes))

    def op(self, kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        """Append a node named like its output and return that."""
        self.nodes.append(
            helper.make_node(kind, list(inputs), [out], name=f"{out}_node", **attributes)
        )
        return out

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> str:
        """Draw a weight of standard deviation scale / sqrt(fan-in)."""
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        values = self._random.standard_normal(shape) * scale / np.sqrt(fan)
        return self.constant(name, values.astype(np.float32))

    def constant(self, name: str, values: np.ndarray) -> str:
        """Add an initializer."""
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def batchnorm(self, source: str, channels: int, *, out: str, training: bool) -> str:
        """Append a BatchNormalization, with running outputs where it trains."""
        ones, name = np.ones(channels, np.float32), f"{out}.bn"
        inputs = [
            source,
            self.constant(f"{name}.scale", ones * np.float32(1.1)),
            self.weight(f"{name}.bias", channels, scale=0.1),
            self.constant(f"{name}.mean", ones * np.float32(0.1)),
            self.constant(f"{name}.var", ones * np.float32(1.5)),
        ]
        outputs = [out, f"{name}.mean_next", f"{name}.var_next"] if training else [out]
        attributes: dict[str, Any] = {"training_mode": 1} if training else {}
        self.nodes.append(
            helper.make_node("BatchNormalization", inputs, outputs, name=name, **attributes)
        )
        return out

    def dropout(self, source: str, ratio: float, *, out: str) -> str:
        """Append a Dropout that is on, as torch exports it for training."""
        rate = self.constant(f"{out}.ratio", np.array(ratio, np.float32))
        on = self.constant(f"{out}.on", np.array(True))
        return self.op("Dropout", source, rate, on, out=out)

    def finish(
        self, inputs: Mapping[str, tuple[int, Sequence[int | str]]], output: str, *dims: int | str
    ) -> onnx.ModelProto:
        """Close the model and check it."""
        graph = helper.make_graph(
            self.nodes,
            "zoo",
            [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
            [helper.make_tensor_value_info(output, FLOAT, ["N", *dims])],
            self.weights,
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8
        )
        onnx.checker.check_model(model, full_check=True)
        return model
