"""Convolutions in blocks give what onnx's reference evaluator gives, and are chosen by the node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.errors import ForbiddenGraph, StageFailed
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.layouts.block_sizes import find_block_size
from splitonnx.runtime.engine.layouts.convolutions import DOMAIN, WIDE, block_convolutions
from splitonnx.runtime.gate.gates import check_graph

BLOCK = 16
ENGINE = Engine(threads=1)
needs_blocks = pytest.mark.skipif(
    find_block_size(onnxruntime) != BLOCK, reason="this machine's ONNX Runtime has other blocks"
)


def build(
    *nodes: onnx.NodeProto,
    shapes: Mapping[str, Any],
    constants: Mapping[str, np.ndarray] | None = None,
    output: str = "y",
) -> bytes:
    """Serialize a graph; of the shape of ``x`` only the channels are declared."""
    inputs = [
        helper.make_tensor_value_info(
            name, TensorProto.FLOAT, ["N", shape[1], "H", "W"] if name == "x" and shape else shape
        )
        for name, shape in shapes.items()
    ]
    held = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def list_operators(model: bytes) -> list[str]:
    nodes = onnx.load_from_string(model).graph.node
    return [f"{node.domain}/{node.op_type}".removeprefix("/") for node in nodes]


def compare(model: bytes, shapes: Mapping[str, tuple[int, ...]], *, training: bool = True) -> None:
    """Compare a graph on the engine with the reference evaluator."""
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    (expected,) = ReferenceEvaluator(model).run(None, feeds)
    stage = ENGINE.load("s", model, training=training)
    values = {name: ENGINE.from_array(array) for name, array in feeds.items()}
    found = ENGINE.to_array(ENGINE.run(stage, values)["y"])
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-4, atol=1e-4)


SIXTEEN = {"x": (1, 16, 3, 3), "w": (16, 16, 3, 3)}
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "dense": ((32, 16, 3, 3), {"pads": [1, 1, 1, 1]}),
    "strided": ((16, 32, 3, 3), {"strides": [2, 1], "pads": [1, 0, 2, 1]}),
    "dilated": ((16, 16, 3, 2), {"dilations": [2, 3]}),
    "a line": ((16, 48, 1, 3), {}),
    "from few channels": ((32, 3, 5, 5), {"pads": [2, 2, 2, 2]}),
    "depthwise": ((32, 1, 3, 3), {"group": 32, "pads": [1, 1, 1, 1]}),
    "strided depthwise": ((16, 1, 3, 3), {"group": 16, "strides": [2, 2]}),
    "same size": ((16, 16, 2, 2), {"auto_pad": "SAME_UPPER"}),
}


@needs_blocks
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", sorted(CASES))
def test_a_blocked_convolution_gives_the_reference_s_results(
    name: str, has_bias: bool, training: bool
) -> None:
    weights, attributes = CASES[name]
    channels = weights[1] * attributes.get("group", 1)
    shapes = {"x": (2, channels, 9, 7), "w": weights}
    if has_bias:
        shapes["b"] = weights[:1]
    model = build(helper.make_node("Conv", list(shapes), ["y"], **attributes), shapes=shapes)
    assert f"{DOMAIN}/Conv" in list_operators(block_convolutions(model, BLOCK))
    compare(model, shapes, training=training)


def mirror(weights: str, *, axes: tuple[int, ...] = (2, 3)) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Slice", [weights, "starts", "ends", "axes", "steps"], ["cut"]),
        helper.make_node("Transpose", ["cut"], ["v"], perm=[1, 0, *axes]),
    ]


def list_bounds(**changes: list[int]) -> dict[str, np.ndarray]:
    bounds = {"starts": [-1, -1], "ends": [-(2**62)] * 2, "axes": [2, 3], "steps": [-1, -1]}
    return {name: np.array(numbers) for name, numbers in (bounds | changes).items()}


def build_mirrored(
    nodes: list[onnx.NodeProto],
    bounds: dict[str, np.ndarray],
    weights: tuple[int, ...] = (32, 16, 3, 2),
) -> bytes:
    conv = helper.make_node("Conv", ["x", "v"], ["y"], pads=[1, 2, 1, 2])
    model = onnx.load_from_string(
        build(*nodes, conv, shapes={"x": (1, 32, 1, 1), "w": weights}, constants=bounds)
    )
    shape = helper.make_tensor_value_info("v", TensorProto.FLOAT, (16, 32, 3, 2))
    model.graph.value_info.append(shape)
    return bytes(model.SerializeToString())


@needs_blocks
def test_mirrored_weights_are_taken_from_where_they_come_from() -> None:
    model = build_mirrored(mirror("w"), list_bounds())
    found = list_operators(block_convolutions(model, BLOCK))
    assert "Slice" not in found
    assert "Gather" in found
    compare(model, {"x": (2, 32, 6, 5), "w": (32, 16, 3, 2)})


@needs_blocks
@pytest.mark.parametrize(
    "bounds",
    [
        list_bounds(starts=[-2, -1]),
        list_bounds(steps=[-2, -1]),
        list_bounds(ends=[-3, -(2**62)]),
        list_bounds(axes=[3, 2], starts=[-1, -2]),
    ],
    ids=["other start", "other step", "other end", "other axes"],
)
def test_weights_that_are_cut_otherwise_are_left_as_they_are(bounds: dict[str, np.ndarray]) -> None:
    model = build_mirrored(mirror("w"), bounds)
    assert "Slice" in list_operators(block_convolutions(model, BLOCK))


@needs_blocks
def test_rearranged_weights_that_are_wanted_elsewhere_are_kept() -> None:
    nodes = [*mirror("w"), helper.make_node("Abs", ["v"], ["other"])]
    model = onnx.load_from_string(build_mirrored(nodes, list_bounds()))
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, None))
    assert "Slice" in list_operators(block_convolutions(model.SerializeToString(), BLOCK))


@pytest.mark.parametrize(
    ("weights", "attributes"),
    [
        ((16, WIDE, 3, 3), {}),
        ((16, 16, 1, 1), {}),
        ((16, 24, 3, 3), {}),
        ((24, 16, 3, 3), {}),
        ((32, 8, 3, 3), {"group": 4}),
        ((32, 1, 3, 3), {"group": 16}),
        ((16, 16, 3, 3), {"pads": [0, 0, 0, -1]}),
        ((16, 16, 3), {}),
        ((16, 16, 3, 3, 3), {}),
    ],
    ids=[
        "wide",
        "one point",
        "odd inputs",
        "odd outputs",
        "groups",
        "several each",
        "negative padding",
        "one axis",
        "a cube",
    ],
)
def test_other_convolutions_stay_as_they_are(
    weights: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    image = (1, weights[1] * attributes.get("group", 1), *weights[2:])
    model = build(node, shapes={"x": image if len(image) == 4 else None, "w": weights})
    assert block_convolutions(model, BLOCK) == model


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT16])
def test_other_types_stay_as_they_are(kind: int) -> None:
    model = onnx.load_from_string(
        build(helper.make_node("Conv", ["x", "w"], ["y"]), shapes=SIXTEEN)
    )
    for value in model.graph.input:
        value.type.tensor_type.elem_type = kind
    content = bytes(model.SerializeToString())
    assert block_convolutions(content, BLOCK) == content


def test_without_blocks_graphs_stay_as_they_are() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    model = build(node, shapes=SIXTEEN)
    assert block_convolutions(model, 0) == model
    assert block_convolutions(model, BLOCK) != model


@needs_blocks
def test_an_image_and_weights_that_two_convolutions_read_are_rearranged_once() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "w"], ["b"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    shapes = {"x": (1, 16, 4, 4), "w": (16, 16, 3, 3)}
    model = build(*nodes, shapes=shapes)
    found = list_operators(block_convolutions(model, BLOCK))
    assert found.count(f"{DOMAIN}/ReorderInput") == 2
    assert found.count(f"{DOMAIN}/Conv") == 1  # they are the same
    compare(model, shapes)


@needs_blocks
@pytest.mark.parametrize("shape", [(1, 32, 5, 5), (1, 3, 5, 5), (1, 16, 5), (1, 16, 0, 0)])
def test_an_image_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    stage = ENGINE.load("s", build(node, shapes={**SIXTEEN, "x": None}), training=True)
    feeds = {"x": np.ones(shape, np.float32), "w": np.ones((16, 16, 3, 3), np.float32)}
    with pytest.raises(StageFailed):
        ENGINE.run(stage, {name: ENGINE.from_array(array) for name, array in feeds.items()})


def build_stacked(columns: int, channels: int = 32) -> bytes:
    """Convolve stacked images with stacked gradients; images [N, 32, 4, 5] declare ``columns``."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["tx"], perm=[1, 0, 2, 3]),
        helper.make_node("Reshape", ["tx", "below"], ["sx"]),
        helper.make_node("Transpose", ["d"], ["td"], perm=[1, 0, 2, 3]),
        helper.make_node("Reshape", ["td", "kernel"], ["sd"]),
        helper.make_node("Conv", ["sx", "sd"], ["y"], group=channels, pads=[1, 1, 1, 1]),
    ]
    constants = {
        "below": np.array([1, channels, -1, columns]),
        "kernel": np.array([channels, 1, -1, columns]),
    }
    shapes = {"x": (1, 32, 4, 5), "d": ["N", 32, 4, 5]}
    model = onnx.load_from_string(build(*nodes, shapes=shapes, constants=constants))
    declared_dims: dict[str, list[int | str]] = {
        "tx": [32, "N", 4, 5], "td": [32, "N", 4, 5], "sx": [1, channels, "M", columns],
        "sd": [channels, 1, "M", columns],
    }  # fmt: skip
    for name, dims in declared_dims.items():
        declared = helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        model.graph.value_info.append(declared)
    return bytes(model.SerializeToString())


@needs_blocks
def test_images_are_stacked_in_blocks() -> None:
    model = build_stacked(5)
    found = list_operators(block_convolutions(model, BLOCK))
    assert found.count("Transpose") == 2
    assert found.index(f"{DOMAIN}/ReorderInput") < found.index("Transpose")
    compare(model, {"x": (3, 32, 4, 5), "d": (3, 32, 4, 5)})


@needs_blocks
@pytest.mark.parametrize(("columns", "channels"), [(4, 32), (5, 16)])
def test_images_in_another_order_are_stacked_before(columns: int, channels: int) -> None:
    model = build_stacked(columns, channels)
    found = list_operators(block_convolutions(model, BLOCK))
    assert found.index("Transpose") < found.index(f"{DOMAIN}/ReorderInput")
    compare(model, {"x": (4, 32, 4, 5), "d": (4, 32, 4, 5)})


def test_whatever_passes_the_gate_is_rewritten_or_left_without_an_error() -> None:
    random = np.random.default_rng(0)
    graphs = [build_stacked(5), build_mirrored(mirror("w"), list_bounds())]
    passed = 0
    for number in range(3000):
        content = bytearray(graphs[number % 2])
        for place in random.integers(0, len(content), random.integers(1, 4)):
            content[place] = random.integers(0, 256)
        try:
            check_graph("s", bytes(content))
        except ForbiddenGraph:
            continue
        passed += 1
        block_convolutions(bytes(content), BLOCK)
    assert passed > 300


@pytest.mark.parametrize("channels", [None, 8, 20])
def test_an_image_that_is_not_declared_with_the_weights_channels_is_left(
    channels: int | None,
) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    image = None if channels is None else (1, channels, 3, 3)
    model = build(node, shapes={**SIXTEEN, "x": image})
    assert block_convolutions(model, BLOCK) == model


@needs_blocks
@pytest.mark.parametrize(
    "taken", ["x/image", "splitonnx.blocked/0", "splitonnx.blocked", "w/split"]
)
def test_names_of_the_graph_are_not_taken_again(taken: str) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], [taken], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", [taken, "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    shapes = {"x": (2, 16, 4, 4), "w": (16, 16, 3, 3)}
    model = onnx.load_from_string(build(*nodes, shapes=shapes))
    declared = helper.make_tensor_value_info(taken, TensorProto.FLOAT, ["N", 16, "H", "W"])
    model.graph.value_info.append(declared)
    content = bytes(model.SerializeToString())
    assert list_operators(block_convolutions(content, BLOCK)).count(f"{DOMAIN}/Conv") == 2
    compare(content, shapes)


@needs_blocks
@pytest.mark.parametrize("first", ["plain", "depthwise"])
def test_weights_that_are_dense_here_and_depthwise_there_are_arranged_for_each(first: str) -> None:
    plain = helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1])
    depthwise = helper.make_node("Conv", ["z", "w"], ["b"], group=16, pads=[1, 1, 1, 1])
    nodes = [plain, depthwise] if first == "plain" else [depthwise, plain]
    shapes = {"x": (2, 1, 4, 4), "w": (16, 1, 3, 3), "z": (2, 16, 4, 4)}
    compare(build(*nodes, helper.make_node("Add", ["a", "b"], ["y"]), shapes=shapes), shapes)


@needs_blocks
def test_a_mirrored_part_of_weights_is_left_as_it_is() -> None:
    content = onnx.load_from_string(
        build_mirrored(mirror("w"), list_bounds(ends=[-4, -4]), weights=(32, 16, 5, 4))
    )
    for value in content.graph.value_info:
        value.type.tensor_type.shape.dim[3].dim_value = 3
    found = bytes(content.SerializeToString())
    assert "Slice" in list_operators(block_convolutions(found, BLOCK))
    compare(found, {"x": (2, 32, 6, 5), "w": (32, 16, 5, 4)})
