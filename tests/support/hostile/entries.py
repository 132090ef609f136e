"""The table of hostile models, and how they are made of the zoo's chain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.support.zoo import FLOAT, ZOO

Make = Callable[[Path], bytes]
HOSTILE: dict[str, tuple[Make, str]] = {}
"""Name -> what writes the model's files and returns the model, and a piece of the error."""


def dump(model: ModelProto) -> bytes:
    content: bytes = model.SerializeToString()
    return content


def chain() -> ModelProto:
    return ZOO["chain"].build()


def hostile(reason: str) -> Callable[[Callable[[ModelProto], None]], None]:
    """Enter a way to spoil the chain model into the table."""

    def enter(spoil: Callable[[ModelProto], None]) -> None:
        def make(folder: Path) -> bytes:
            model = chain()
            spoil(model)
            content: bytes = model.SerializeToString()
            return content

        HOSTILE[spoil.__name__] = (make, reason)

    return enter


def raw(reason: str) -> Callable[[Make], None]:
    """Enter a model given as bytes, with files of its own."""

    def enter(make: Make) -> None:
        HOSTILE[make.__name__] = (make, reason)

    return enter


def put_behind(model: ModelProto, node: NodeProto, place: int = 4) -> None:
    """Put a node in the chain: it reads ``act1``, and what it gives goes on as ``odd``."""
    model.graph.node.insert(place, node)
    for later in model.graph.node[place + 1 :]:
        for index, name in enumerate(later.input):
            if name == "act1":
                later.input[index] = "odd"


def add_function(model: ModelProto, name: str, nodes: list[NodeProto]) -> None:
    imports = [*model.opset_import]
    if len(imports) == 1:
        model.opset_import.append(helper.make_opsetid("mine", 1))
        imports = [*model.opset_import]
    model.functions.append(helper.make_function("mine", name, ["a"], ["b"], nodes, imports))


def make_if(nodes: list[NodeProto], name: str, *, result: str = "odd") -> NodeProto:
    body = helper.make_graph(nodes, "body", [], [helper.make_tensor_value_info(name, FLOAT, None)])
    other = helper.make_node("Identity", ["act1"], ["other"])
    ends = [helper.make_tensor_value_info("other", FLOAT, None)]
    branches = {"then_branch": body, "else_branch": helper.make_graph([other], "other", [], ends)}
    return helper.make_node("If", ["condition"], [result], **branches)


def make_loop(trips: int) -> NodeProto:
    value = helper.make_tensor_value_info("carried", FLOAT, None)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Relu", ["carried"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            value,
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, None),
        ],
    )
    return helper.make_node("Loop", [f"trips{trips}", "", "act1"], ["odd"], body=body)


def complete(content: bytes) -> bytes:
    """Add the small constants that some of the nodes above read."""
    model = ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        return content
    read = {name for node in model.graph.node for name in node.input if isinstance(name, str)}
    if "condition" in read:
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    for name in read:
        if name.startswith("trips"):
            trips = numpy_helper.from_array(np.array(int(name.removeprefix("trips"))), name)
            model.graph.initializer.append(trips)
    return dump(model) if {"condition"} & read or "trips" in str(read) else content
