"""A few bytes that claim, or would make, terabytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.support.hostile.entries import (
    HOSTILE,
    chain,
    dump,
    hostile,
    put_behind,
)
from tests.support.zoo import FLOAT


@hostile("declares 4398046511104 bytes")
def twenty_bytes_that_claim_terabytes(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.raw_data = bytes(20)
    tensor.dims[:] = [2**20, 2**20]


@hostile("declares 4398046511104 bytes")
def no_bytes_that_claim_terabytes(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.dims[:] = [2**20, 2**20]


@hostile("declares")
def size_that_overflows(model: ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**62, 2**62, 0x10]


@hostile("strings")
def strings_that_are_not_there(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_type = TensorProto.STRING


@hostile("sparse")
def sparse_weight(model: ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    places = numpy_helper.from_array(np.zeros(1, np.int64), "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [2**40]))


def enter_terabytes(kind: str, *values: int, **attributes: Any) -> None:
    """Enter a constant of terabytes that an operator makes of a few bytes."""

    def make(folder: Path) -> bytes:
        model, names = chain(), []
        for index, value in enumerate(values):
            array = np.array(value if kind == "Range" else [value, 2**20])
            model.graph.initializer.append(numpy_helper.from_array(array, f"size{index}"))
            names.append(f"size{index}")
        if kind in ("Expand", "Tile", "Pad"):
            seed = numpy_helper.from_array(np.ones((1, 1), np.float32), "seed")
            model.graph.initializer.append(seed)
            if kind == "Pad":
                model.graph.initializer[-2].CopyFrom(
                    numpy_helper.from_array(np.array([0, 0, *values, 2**20]), "size0")
                )
            names.insert(0, "seed")
        nodes = [helper.make_node(kind, names, ["large"], **attributes)]
        nodes.append(helper.make_node("Cast", ["large"], ["floats"], to=FLOAT))
        nodes.append(helper.make_node("Add", ["act1", "floats"], ["odd"]))
        for offset, node in enumerate(nodes):
            put_behind(model, node, 4 + offset)
        nodes[-1].input[0] = "act1"
        model.graph.node[6].input[0] = "act1"
        return dump(model)

    HOSTILE[f"{kind}_of_terabytes"] = (make, "")


enter_terabytes("ConstantOfShape", 2**22)
enter_terabytes("Expand", 2**22)
enter_terabytes("Tile", 2**22)
enter_terabytes("Range", 0, 2**42, 1)
enter_terabytes("Pad", 2**22)
