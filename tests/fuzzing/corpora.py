"""Models to mutate: the zoo, and what the onnx package itself ships for its tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.zoo import ZOO

_SHIPPED = Path(onnx.__file__).parent / "backend" / "test" / "data"
_MOST_BYTES = 200_000


def list_models() -> list[bytes]:
    """List the corpus; node tests get a weight on their way, so that they have a gradient."""
    models = [entry.build() for entry in ZOO.values()]
    for folder in ("pytorch-operator", "pytorch-converted", "simple"):
        models += _load_models(folder)
    models += [model for model in _load_models("node") if _add_weight(model)]
    return [model.SerializeToString() for model in models]


def list_networks() -> list[bytes]:
    """List the large networks, whose cut takes seconds."""
    return [path.read_bytes() for path in sorted((_SHIPPED / "light").glob("*.onnx"))]


def _load_models(folder: str) -> Iterator[ModelProto]:
    for path in sorted((_SHIPPED / folder).glob("*/model.onnx")):
        if path.stat().st_size <= _MOST_BYTES:
            yield onnx.load_model(path, load_external_data=False)


def _add_weight(model: ModelProto) -> bool:
    """Multiply each float input by a weight; say whether there is one."""
    scaled = []
    for index, value in enumerate(model.graph.input):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            weight = numpy_helper.from_array(np.ones(1, np.float32), f"weight{index}")
            model.graph.initializer.append(weight)
            scaled.append((value.name, weight.name))
    for name, weight_name in scaled:
        moved = f"{name}.scaled"
        for node in model.graph.node:
            for place, source in enumerate(node.input):
                if source == name:
                    node.input[place] = moved
        model.graph.node.insert(0, helper.make_node("Mul", [name, weight_name], [moved]))
    return bool(scaled)
