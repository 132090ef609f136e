"""Stages that do not end, to test what ends them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import msgspec
import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.manifests import Source, StageInput
from tests.support import tiny

TRIPS = 1 << 62


def loop_over(source: str, result: str) -> list[NodeProto]:
    """Make nodes that give ``result``, which is ``source``, after 2^62 trips."""
    return [
        helper.make_node(
            "Constant", [], [f"{result}.trips"], value=numpy_helper.from_array(np.array(TRIPS))
        ),
        helper.make_node("Loop", [f"{result}.trips", "", source], [result], body=_body(source)),
    ]


def _body(name: str) -> GraphProto:
    return helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["goes_on"]),
            helper.make_node("Identity", ["before"], ["after"]),
        ],
        f"{name}.loop",
        [
            helper.make_tensor_value_info("trip", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
    )


def endless_bundle(party: str = "server") -> Bundle:
    """The tiny model, whose server's training step, or client's forward stage, does not end."""
    if party == "client":
        nodes = [helper.make_node("MatMul", ["x", "W1"], ["a"]), *loop_over("a", "h")]
        inputs = {"x": Source.DATA, "W1": Source.STATE}
        return _replace(party, "head.forward", nodes, inputs, ("h",))
    nodes = [
        *loop_over("h", "late"),
        helper.make_node("ReduceMean", ["late"], ["loss"], keepdims=0),
        helper.make_node("Identity", ["late"], ["h.grad"]),
        helper.make_node("Identity", ["W2"], ["W2.grad"]),
    ]
    return _replace_step(nodes)


def stuck_bundle() -> Bundle:
    """The tiny model, whose server's training step holds one operator of many seconds."""
    size = numpy_helper.from_array(np.array([12288, 12288]))
    nodes = [
        helper.make_node("Constant", [], ["size"], value=size),
        helper.make_node("ReduceMean", ["h"], ["mean"], keepdims=0),
        helper.make_node("Expand", ["mean", "size"], ["large"]),  # so that it is not folded
        helper.make_node("MatMul", ["large", "large"], ["product"]),
        helper.make_node("ReduceMean", ["product"], ["loss"], keepdims=0),
        helper.make_node("Identity", ["h"], ["h.grad"]),
        helper.make_node("Identity", ["W2"], ["W2.grad"]),
    ]
    return _replace_step(nodes)


def _replace_step(nodes: list[NodeProto]) -> Bundle:
    inputs = {"h": Source.WIRE, "labels": Source.WIRE, "W2": Source.STATE}
    return _replace("server", "body.step", nodes, inputs, ("loss", "h.grad", "W2.grad"))


def _replace(
    party: str,
    stage: str,
    nodes: list[NodeProto],
    sources: dict[str, Source],
    outputs: tuple[str, ...],
) -> Bundle:
    """Give one stage of the tiny model another graph."""
    bundle = tiny.split_bundle()
    before = bundle.parties[party]
    inputs = tuple(StageInput(name=name, source=source) for name, source in sources.items())
    graph = tiny.make_graph(nodes, inputs, outputs)
    name = f"{stage}.onnx"
    files = {**before.manifest.files, name: hashlib.sha256(graph).hexdigest()}
    changed = PartyBundle(
        manifest=msgspec.structs.replace(before.manifest, files=files),
        graphs={**before.graphs, name: graph},
        weights=before.weights,
    )
    return replace(bundle, parties={**bundle.parties, party: changed})
