"""Models to mutate: the zoo, and what the onnx package itself ships for its tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.support.pools import replace_pools
from tests.support.zoo import ZOO

_SHIPPED = Path(onnx.__file__).parent / "backend" / "test" / "data"
_MOST_BYTES = 200_000


def list_models() -> list[list[bytes]]:
    """List the corpus by kind; models without weights get some, so that they have a gradient."""
    zoo = [entry.build() for entry in ZOO.values()]
    converted = list(_load_models("pytorch-converted", "pytorch-operator", "simple"))
    nodes = [model for model in _collect_cases() if _add_weights(model)]
    for model in converted:
        if not model.graph.initializer:
            _add_weights(model)
    return [[m.SerializeToString() for m in models] for models in (zoo, converted, nodes)]


def list_networks() -> list[bytes]:
    """List the large networks, whose cut takes seconds."""
    return [path.read_bytes() for path in sorted((_SHIPPED / "light").glob("*.onnx"))]


def _load_models(*folders: str) -> Iterator[ModelProto]:
    for folder in folders:
        for path in sorted((_SHIPPED / folder).glob("*/model.onnx")):
            if path.stat().st_size <= _MOST_BYTES:
                model = onnx.load_model(path, load_external_data=False)
                if all(node.domain in ("", "ai.onnx") for node in model.graph.node):
                    yield model


def _collect_cases() -> Iterator[ModelProto]:
    """Yield the onnx package's test cases of single operators."""
    replace_pools()  # it computes what each model gives, which nobody asks here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found = collect_testcases(None)
    for case in found:
        if case.model is not None and case.model.ByteSize() <= _MOST_BYTES:
            model = ModelProto()
            model.CopyFrom(case.model)
            yield model


def _add_weights(model: ModelProto) -> bool:
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
