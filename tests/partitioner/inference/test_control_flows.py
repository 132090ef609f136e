"""Control flow that is known in advance trains; any other one is refused or left alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from splitonnx.errors import NotDifferentiable
from splitonnx.partitioner.inference import control_flows
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.oracles import LOSSES, STEP, to_double

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
RANDOM = np.random.default_rng(3)
WEIGHTS = {
    "w1": RANDOM.standard_normal((4, 4)).astype(np.float32),
    "w2": RANDOM.standard_normal((4, 4)).astype(np.float32),
    "w3": RANDOM.standard_normal((4, 3)).astype(np.float32),
}
CONSTANTS = {
    "yes": np.array(True),
    "no": np.array(False),
    "three": np.array(3),
    "one": np.array(1),
    "zero": np.array(0),
    "seven": np.array(7),
    "half": np.array(0.5, np.float32),
}


def node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> NodeProto:
    return helper.make_node(
        kind, list(inputs), list(outputs), name=f"{outputs[0]}_node", **attributes
    )


def value(name: str, kind: int, dims: Sequence[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def body(
    nodes: Sequence[NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Sequence[TensorProto] = (),
) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "body", list(inputs), list(outputs), list(constants))


def build(middle: Sequence[NodeProto], end: str = "m") -> onnx.ModelProto:
    """Wrap ``middle``, which leads from ``h`` (N, 4) to ``end`` (N, 4), in two layers."""
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]),
        node("Tanh", ["a"], ["h"]),
        *middle,
        node("Tanh", [end], ["t"]),
        node("MatMul", ["t", "w3"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "flow",
        [value("x", FLOAT, ["N", 4])],
        [value("y", FLOAT, ["N", 3])],
        [numpy_helper.from_array(a, n) for n, a in {**WEIGHTS, **CONSTANTS}.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def make_data(samples: int = 12) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    x = random.standard_normal((samples, 4), np.float32)
    return {"x": x, "labels": random.integers(0, 3, samples)}


def differentiate_numerically(
    model: onnx.ModelProto, data: dict[str, np.ndarray], parameter: str
) -> np.ndarray:
    """Central differences in float64 by ONNX Runtime, which runs the control flow as it stands."""
    double = to_double(model)
    for tensor in list(double.graph.initializer):
        if tensor.name == parameter:
            double.graph.initializer.remove(tensor)
            double.graph.input.append(value(parameter, TensorProto.DOUBLE, tensor.dims))
    session = onnxruntime.InferenceSession(double.SerializeToString())
    weight = WEIGHTS[parameter].astype(np.float64)

    def measure(change: np.ndarray) -> float:
        feeds = {"x": data["x"].astype(np.float64), parameter: weight + change}
        return LOSSES["cross-entropy"](session.run(None, feeds)[0], data["labels"])

    gradient = np.zeros_like(weight)
    for place in np.ndindex(weight.shape):
        change = np.zeros_like(weight)
        change[place] = STEP
        gradient[place] = (measure(change) - measure(-change)) / (2 * STEP)
    return gradient


def assert_trains(model: onnx.ModelProto, parameters: Sequence[str] = ("w1", "w2", "w3")) -> None:
    """Hold gradients against finite differences, a split against the whole, merged to original."""
    data = make_data()
    whole = cut(model, at=None)
    session = onnxruntime.InferenceSession(whole.client.graphs["model.step.onnx"])
    feeds = {**whole.client.weights, **data}
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, feeds), strict=True))
    for parameter in parameters:
        expected = differentiate_numerically(model, data, parameter)
        np.testing.assert_allclose(found[f"{parameter}_grad"], expected, rtol=1e-3, atol=1e-5)
    bundle = cut(model, at="h", tail_at="t", client_target="portable", server_target="portable")
    assert verify(bundle, data, batch_size=4).largest_difference <= 1e-6
    original = onnxruntime.InferenceSession(model.SerializeToString())
    merged = onnxruntime.InferenceSession(merge(bundle))
    for count in (2, 5):
        feed = {"x": data["x"][:count]}
        np.testing.assert_allclose(
            merged.run(None, feed)[0], original.run(None, feed)[0], rtol=1e-5, atol=1e-6
        )


def make_if(condition: str) -> NodeProto:
    """Both branches use the same inner names, one reads an initializer of its own."""
    scale = numpy_helper.from_array(np.array(0.25, np.float32), "scale")
    then = body(
        [node("MatMul", ["h", "w2"], ["inner"]), node("Mul", ["inner", "scale"], ["out"])],
        [],
        [value("out", FLOAT, None)],
        [scale],
    )
    other = body([node("Neg", ["h"], ["inner"]), node("Identity", ["inner"], ["out2"])],
                 [], [value("out2", FLOAT, None)])  # fmt: skip
    return node("If", [condition], ["m"], then_branch=then, else_branch=other)


def test_the_branch_of_a_constant_condition_is_inlined() -> None:
    assert_trains(build([make_if("yes")]))
    assert_trains(build([make_if("no")]), ["w1", "w3"])


def test_a_condition_on_a_fixed_dimension_is_constant() -> None:
    shape = [
        node("Shape", ["h"], ["s"]),
        node("Gather", ["s", "one"], ["width"]),
        node("Greater", ["width", "three"], ["wide"]),
    ]
    assert_trains(build([*shape, make_if("wide")]))


def test_branches_nest_and_may_give_what_they_captured() -> None:
    inner = body([make_if("yes")], [], [value("m", FLOAT, None)])
    other = body([node("Identity", ["h"], ["same"])], [], [value("same", FLOAT, None)])
    inner.node[0].output[0] = inner.output[0].name = "deep"
    nested = node("If", ["yes"], ["m"], then_branch=inner, else_branch=other)
    assert_trains(build([nested]))
    captured = node("If", ["no"], ["m"], then_branch=inner, else_branch=other)
    assert_trains(build([captured]), ["w1", "w3"])


def test_two_branches_with_the_same_names_live_side_by_side() -> None:
    first, second = make_if("yes"), make_if("yes")
    second.output[0], second.name = "m2", "second"
    assert_trains(build([first, second, node("Add", ["m", "m2"], ["sum"])], "sum"))


def test_an_if_on_data_trains_both_branches() -> None:
    condition = [
        node("ReduceMax", ["h"], ["top"], keepdims=0),
        node("Greater", ["top", "half"], ["hot"]),
    ]
    assert_trains(build([*condition, make_if("hot")]))


def test_a_condition_on_data_stays_where_no_gradient_passes() -> None:
    then = body([node("Neg", ["x"], ["n"])], [], [value("n", FLOAT, None)])
    other = body([node("Mul", ["x", "half"], ["n2"])], [], [value("n2", FLOAT, None)])
    nodes = [
        node("ReduceMax", ["x"], ["top"], keepdims=0),
        node("Greater", ["top", "half"], ["hot"]),
        node("If", ["hot"], ["chosen"], then_branch=then, else_branch=other),
        node("Add", ["h", "chosen"], ["m"]),
    ]
    model = build(nodes)
    bundle = cut(model, at="m")
    assert verify(bundle, make_data(), batch_size=4).largest_difference == 0.0


def make_loop(trips: str, condition: str, again: Sequence[NodeProto], cond: str) -> NodeProto:
    """h <- tanh(h @ w2) + i; each step's h is stacked too."""
    nodes = [
        node("MatMul", ["state", "w2"], ["product"]),
        node("Tanh", ["product"], ["bent"]),
        node("Cast", ["i"], ["count"], to=FLOAT),
        node("Add", ["bent", "count"], ["next"]),
        node("Mul", ["next", "half"], ["row"]),
        *again,
    ]
    inputs = [value("i", INT64, []), value("going", BOOL, []), value("state", FLOAT, None)]
    outputs = [value(cond, BOOL, []), value("next", FLOAT, None), value("row", FLOAT, None)]
    return node(
        "Loop", [trips, condition, "h"], ["last", "rows"], body=body(nodes, inputs, outputs)
    )


JOIN = [
    node("ReduceSum", ["rows", "zeros"], ["total"], keepdims=0),
    node("Add", ["last", "total"], ["m"]),
]
ZEROS = node("Unsqueeze", ["zero", "first"], ["zeros"])
FIRST = helper.make_node("Constant", [], ["first"], name="first_node", value_ints=[0])


def test_a_loop_of_known_length_is_unrolled() -> None:
    same = [node("Identity", ["going"], ["still"])]
    for condition in ("yes", ""):
        loop = make_loop("three", condition, same, "still")
        assert_trains(build([FIRST, ZEROS, loop, *JOIN]))


def test_a_loop_that_counts_ends_when_its_condition_says_so() -> None:
    count = [node("Less", ["i", "one"], ["still"])]
    loop = make_loop("seven", "yes", count, "still")
    model = build([FIRST, ZEROS, loop, *JOIN])
    assert_trains(model)
    assert_trains(build([FIRST, ZEROS, make_loop("", "yes", count, "still"), *JOIN]))


def test_a_loop_over_a_fixed_dimension_is_unrolled() -> None:
    same = [node("Identity", ["going"], ["still"])]
    nodes = [
        node("Shape", ["h"], ["s"]),
        node("Gather", ["s", "one"], ["width"]),
        FIRST,
        ZEROS,
        make_loop("width", "yes", same, "still"),
        *JOIN,
    ]
    assert_trains(build(nodes))


def test_a_loop_that_does_not_run_gives_what_went_in() -> None:
    same = [node("Identity", ["going"], ["still"])]
    loop = make_loop("zero", "yes", same, "still")
    loop.output[1] = ""
    del loop.output[1:]
    del loop.attribute[0].g.output[2:]
    assert_trains(build([loop], "last"), ["w1", "w3"])


def build_nested() -> onnx.ModelProto:
    """Three runs of three runs of six nodes."""
    same = [node("Identity", ["going"], ["still"])]
    inner = make_loop("three", "yes", same, "still")
    del inner.output[1:]
    del inner.attribute[0].g.output[2:]
    inner.input[2], inner.output[0], inner.name = "outer", "after", "inner"
    outer = body(
        [inner, node("Identity", ["more"], ["again"])],
        [value("j", INT64, []), value("more", BOOL, []), value("outer", FLOAT, None)],
        [value("again", BOOL, []), value("after", FLOAT, None)],
    )
    return build([node("Loop", ["three", "", "h"], ["m"], body=outer)])


def test_loops_nest() -> None:
    assert_trains(build_nested())


NOISE = node("RandomNormalLike", ["next"], ["noise"])
TOP = node("ReduceMax", ["next"], ["top"], keepdims=0)
SMALL = [TOP, node("Less", ["top", "half"], ["still"])]


def test_a_loop_whose_end_depends_on_data_trains() -> None:
    assert_trains(build([FIRST, ZEROS, make_loop("seven", "yes", SMALL, "still"), *JOIN]))


def test_a_loop_whose_end_depends_on_data_is_refused_if_it_draws() -> None:
    loop = make_loop("seven", "yes", [NOISE, *SMALL], "still")
    with pytest.raises(NotDifferentiable, match=r"\(Loop\).* its condition depends on the data"):
        cut(build([FIRST, ZEROS, loop, *JOIN]), at=None)


def test_a_loop_that_would_grow_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_flows, "MOST_NODES", 10)
    loop = make_loop("seven", "yes", [NOISE, node("Identity", ["going"], ["still"])], "still")
    with pytest.raises(NotDifferentiable, match=r"more than 10 nodes"):
        cut(build([FIRST, ZEROS, loop, *JOIN]), at=None)


def test_the_nodes_within_a_body_count_before_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[object] = []
    monkeypatch.setattr(control_flows, "copy_body", lambda *given: copied.append(given))
    monkeypatch.setattr(control_flows, "MOST_NODES", 40)
    inner = body(
        [node("Relu", [f"r{i}"] if i else ["state"], [f"r{i + 1}"]) for i in range(9)],
        [],
        [value("r9", FLOAT, None)],
    )
    branch = node("If", ["data"], ["next"], then_branch=inner, else_branch=inner)
    outer = body(
        [node("Identity", ["going"], ["still"]), FIRST_TRUE, branch],
        [value("i", INT64, []), value("going", BOOL, []), value("state", FLOAT, None)],
        [value("still", BOOL, []), value("next", FLOAT, None)],
    )
    model = build([node("Loop", ["three", "", "h"], ["m"], body=outer)])
    with pytest.raises(NotDifferentiable, match=r"3 runs of 21 nodes would be more than 40 nodes"):
        cut(model, at=None)
    assert not copied


FIRST_TRUE = node("Cast", ["i"], ["data"], to=BOOL)


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_scan_of_known_length_is_unrolled(direction: int, axis: int) -> None:
    """A recurrent layer over the columns of h, its states put side by side again."""
    nodes = [
        node("Mul", ["state", "half"], ["less"]),
        node("Add", ["less", "piece"], ["next"]),
        node("Sin", ["next"], ["out"]),
    ]
    inner = body(
        nodes,
        [value("state", FLOAT, None), value("piece", FLOAT, None)],
        [value("next", FLOAT, None), value("out", FLOAT, None)],
    )
    perm = [1, 0] if axis == 0 else [0, 1]  # the columns of h lie along the scan's axis
    flow = [
        node("MatMul", ["h", "w2"], ["p"]),
        node("Transpose", ["p"], ["turned"], perm=perm),
        node("ReduceMean", ["p", "ones"], ["start"], keepdims=0),
        helper.make_node(
            "Scan",
            ["start", "turned"],
            ["final", "found"],
            name="scan",
            body=inner,
            num_scan_inputs=1,
            scan_input_axes=[axis],
            scan_input_directions=[direction],
            scan_output_axes=[axis],
            scan_output_directions=[1 - direction],
        ),
        node("Transpose", ["found"], ["m"], perm=perm),
    ]
    ones = helper.make_node("Constant", [], ["ones"], name="ones_node", value_ints=[1])
    assert_trains(build([ones, *flow]))


def test_a_scan_over_the_batch_trains() -> None:
    inner = body(
        [node("Add", ["state", "piece"], ["next"])],
        [value("state", FLOAT, None), value("piece", FLOAT, None)],
        [value("next", FLOAT, None)],
    )
    numbers = numpy_helper.from_array(np.zeros(4, np.float32))
    zeros = node("Constant", [], ["z"], value=numbers)
    scan = node("Scan", ["z", "h"], ["sum"], body=inner, num_scan_inputs=1)
    assert_trains(build([zeros, scan, node("Add", ["h", "sum"], ["m"])]), ["w1", "w3"])


def test_what_only_a_body_read_is_gone_with_it() -> None:
    inner = body(
        [
            node("Unsqueeze", ["one", "first"], ["axes"]),
            node("ReduceMean", ["state", "axes"], ["mean"]),
            node("MatMul", ["state", "w2"], ["product"]),
            node("Sub", ["product", "mean"], ["next"]),
            node("Identity", ["going"], ["still"]),
        ],
        [value("i", INT64, []), value("going", BOOL, []), value("state", FLOAT, None)],
        [value("still", BOOL, []), value("next", FLOAT, None)],
    )
    assert_trains(build([FIRST, node("Loop", ["three", "", "h"], ["m"], body=inner)]))


def list_trained(model: onnx.ModelProto) -> set[str]:
    step = cut(model, at=None).client.graphs["model.step.onnx"]
    return {each.op_type for each in onnx.load_from_string(step).graph.node}


def test_loops_within_loops_share_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_flows, "MOST_NODES", 25)
    model = build_nested()
    assert "Loop" in list_trained(model)
    assert_trains(model)
    monkeypatch.setattr(control_flows, "MOST_NODES", 100)
    assert "Loop" not in list_trained(model)
