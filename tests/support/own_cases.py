"""Cases of operators that the onnx package has none of tensors for: graphs around one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.support.oracles import make_evaluator

OPSET = 21

node = helper.make_node


def build_own_cases() -> list[tuple[str, str, ModelProto, Mapping[str, np.ndarray]]]:
    """Build (name, operator, model, inputs) of every case."""
    random = np.random.default_rng(3)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    pair = {"x": draw(3, 4), "w": draw(3, 4)}
    images = {"x": draw(2, 3, 4, 5)}
    regions = {"x": draw(1, 2, 6, 6), "rois": np.array([[0, 0, 0, 5, 5], [0, 1, 1, 4, 3]], "f")}
    first, last = _constant("first", 0), _constant("last", 1)
    halves = [node("SplitToSequence", ["x"], ["pieces"], axis=1, keepdims=1)]
    both = [node("SequenceConstruct", ["x", "w"], ["both"])]
    picked = node("SequenceAt", ["both", "first"], ["y"])
    joined = node("ConcatFromSequence", ["both"], ["y"], axis=1)
    return [
        _case("global_lp_pool", "GlobalLpPool", [node("GlobalLpPool", ["x"], ["y"])], images),
        _case("global_lp_1", "GlobalLpPool", [node("GlobalLpPool", ["x"], ["y"], p=1)], images),
        _case("global_lp_3", "GlobalLpPool", [node("GlobalLpPool", ["x"], ["y"], p=3)], images),
        _case(
            "max_roi_pool", "MaxRoiPool",
            [node("MaxRoiPool", ["x", "rois"], ["y"], pooled_shape=[2, 2])], regions,
        ),
        _case("sequence_at", "SequenceAt", [*both, first, picked], pair),
        _case("sequence_construct", "SequenceConstruct", [*both, joined], pair),
        _case("concat_from_sequence", "ConcatFromSequence", [*both, joined], pair),
        _case(
            "stack_from_sequence", "ConcatFromSequence",
            [*both, node("ConcatFromSequence", ["both"], ["y"], axis=0, new_axis=1)], pair,
        ),
        _case(
            "split_to_sequence", "SplitToSequence",
            [*halves, last, node("SequenceAt", ["pieces", "last"], ["y"])], {"x": draw(3, 4)},
        ),
        _case(
            "sequence_empty", "SequenceEmpty",
            [
                node("SequenceEmpty", [], ["none"]),
                node("SequenceInsert", ["none", "x"], ["both"]), first, picked,
            ],
            {"x": draw(3, 4)},
        ),
        _case(
            "sequence_insert", "SequenceInsert",
            [
                *both, node("SequenceInsert", ["both", "w"], ["three"]),
                node("ConcatFromSequence", ["three"], ["y"], axis=0),
            ],
            pair,
        ),
        _case(
            "sequence_erase", "SequenceErase",
            [
                *both, first, node("SequenceErase", ["both", "first"], ["one"]),
                node("SequenceAt", ["one", "first"], ["y"]),
            ],
            pair,
        ),
        _case(
            "sequence_length", "SequenceLength",
            [*both, node("SequenceLength", ["both"], ["n"]), node("Cast", ["n"], ["y"], to=1)],
            pair,
        ),
        _case("if_then", "If", [_constant("yes", True), _choose()], pair),
        _case(
            "loop", "Loop", [_constant("times", 3), _constant("on", True), _repeat()], pair
        ),
    ]  # fmt: skip


def _case(
    name: str, operator: str, nodes: Sequence[NodeProto], inputs: Mapping[str, np.ndarray]
) -> tuple[str, str, ModelProto, Mapping[str, np.ndarray]]:
    infos = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in inputs.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), name, infos, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    return f"own_{name}", operator, model, inputs


def evaluate_own(model: ModelProto, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the case's output, for its shape."""
    results = make_evaluator(model).run(None, dict(inputs))
    assert isinstance(results, list)
    return np.asarray(results[0])


def _constant(name: str, value: int | bool) -> NodeProto:
    array: np.ndarray = np.array(value, np.bool_ if isinstance(value, bool) else np.int64)
    return node("Constant", [], [name], value=numpy_helper.from_array(array, name))


def _choose() -> NodeProto:
    """x * w where ``yes``, else x + w."""
    branches = {}
    for kind, operator in (("then_branch", "Mul"), ("else_branch", "Add")):
        value = helper.make_tensor_value_info(f"{kind}.y", TensorProto.FLOAT, None)
        inner = node(operator, ["x", "w"], [f"{kind}.y"])
        branches[kind] = helper.make_graph([inner], kind, [], [value])
    return node("If", ["yes"], ["y"], **branches)


def _repeat() -> NodeProto:
    """x -> tanh(x * w), three times."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            node("Mul", ["state", "w"], ["product"]),
            node("Tanh", ["product"], ["next"]),
            node("Identity", ["go"], ["going"]),
        ],
        "body",
        [
            info("turn", TensorProto.INT64, []),
            info("go", TensorProto.BOOL, []),
            info("state", TensorProto.FLOAT, None),
        ],
        [info("going", TensorProto.BOOL, []), info("next", TensorProto.FLOAT, None)],
    )
    return node("Loop", ["times", "on", "x"], ["y"], body=body)
