"""The model given is brought into the form of a bundle, by nothing that prepares models."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from splitonnx.names import DropoutMode
from splitonnx.partitioner.cutting.conformance.dataflow import NotRun
from splitonnx.partitioner.cutting.conformance.originals import (
    copy_original,
    find_false_sizes,
    find_random,
    forbid_rounding,
    name_source,
    read_comparable,
    set_inference_modes,
    set_training_modes,
)
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from tests.support.nets import FLOAT, Net
from tests.support.packed_models import build_packed
from tests.support.small_models import evaluate, load_model

DATA = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)


def build_normalized(*, training: bool) -> onnx.ModelProto:
    """Build a model with one BatchNormalization behind a product."""
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w", 4, 3), out="hidden")
    return net.finish(
        {"x": (FLOAT, ["N", 4])}, net.batchnorm(hidden, 3, out="y", training=training), 3
    )


def test_what_cannot_be_compared_is_not_read() -> None:
    model = build_normalized(training=True)
    prepared = prepare(open_model(model))
    assert read_comparable(model, prepared, 1 << 20) == model
    with pytest.raises(NotRun, match="its weights take 0 MB"):
        read_comparable(model, prepared, 10)
    drawn = helper.make_node("RandomNormalLike", ["y"], ["noise"], name="draw")
    model.graph.node.append(drawn)
    with pytest.raises(NotRun, match="node 'draw' draws random numbers"):
        read_comparable(model, prepared, 1 << 20)


def test_no_kernel_rounds_what_the_model_gives_as_floats() -> None:
    model = build_packed(level=4)
    read = read_comparable(model, prepare(open_model(model)), 1 << 20)
    assert read == build_packed(level=0)
    assert model == build_packed(level=4)
    assert forbid_rounding(copy_original(model)) == {"packed": 4}
    assert forbid_rounding(read) == {}


def test_a_model_without_a_path_is_the_model() -> None:
    assert (name_source("a.onnx"), name_source(b"")) == ("a.onnx", "the model")


def build_dropping() -> onnx.ModelProto:
    """Build a model with one Dropout that is on."""
    net = Net()
    return net.finish({"x": (FLOAT, ["N", 4])}, net.dropout("x", 0.5, out="y"), 4)


def run(model: onnx.ModelProto) -> np.ndarray:
    return evaluate(model, {"x": DATA})[model.graph.output[0].name]


def normalize(mean: np.ndarray | float, variance: np.ndarray | float) -> np.ndarray:
    """Compute the BatchNormalization of `build_normalized` in numpy, with these statistics."""
    weights = {
        t.name: numpy_helper.to_array(t) for t in build_normalized(training=True).graph.initializer
    }
    hidden = DATA @ weights["w"]
    mean = hidden.mean(0) if mean is None else mean
    scaled = (hidden - mean) / np.sqrt(variance + 1e-5)
    result: np.ndarray = scaled * weights["y.bn.scale"] + weights["y.bn.bias"]
    return result


def test_batchnorm_uses_its_running_statistics_in_inference() -> None:
    model = build_normalized(training=True)
    set_inference_modes(model)
    np.testing.assert_allclose(run(model), normalize(0.1, 1.5), rtol=1e-4, atol=1e-5)


def test_new_running_statistics_are_the_stored_ones_in_inference() -> None:
    model = build_normalized(training=True)
    model.graph.output.append(helper.make_tensor_value_info("y.bn.mean_next", FLOAT, [3]))
    set_inference_modes(model)
    found = evaluate(model, {"x": DATA})["y.bn.mean_next"]
    np.testing.assert_allclose(found, np.full(3, 0.1, np.float32))


@pytest.mark.parametrize("name", ["32_stdconv", "13_instancenorm_as_bn"])
def test_a_normalization_without_running_statistics_keeps_its_own(name: str) -> None:
    model = load_model(name)
    given = model.SerializeToString(deterministic=True)
    set_inference_modes(model)
    assert model.SerializeToString(deterministic=True) == given


@pytest.mark.parametrize("training", [False, True])
def test_batchnorm_follows_the_mode_chosen_for_training(training: bool) -> None:
    model = build_normalized(training=not training)
    assert set_training_modes(model, "train" if training else "frozen", None)
    hidden = DATA @ numpy_helper.to_array(model.graph.initializer[0])
    expected = normalize(hidden.mean(0), hidden.var(0)) if training else normalize(0.1, 1.5)
    np.testing.assert_allclose(run(model), expected, rtol=1e-4, atol=1e-5)


def test_without_a_mode_batchnorm_stays_as_it_is_in_training() -> None:
    model = build_normalized(training=True)
    given = copy_original(model)
    assert set_training_modes(model, None, None)
    assert model == given


def test_an_old_batchnorm_cannot_be_set_to_training() -> None:
    model = build_normalized(training=False)
    model.opset_import[0].version = 13
    assert not set_training_modes(model, "train", None)


def test_dropout_does_nothing_in_inference() -> None:
    model = build_dropping()
    set_inference_modes(model)
    np.testing.assert_array_equal(run(model), DATA)


@pytest.mark.parametrize(("mode", "comparable"), [(None, False), ("keep", False), ("off", True)])
def test_a_model_whose_dropout_is_on_cannot_be_compared_in_training(
    mode: DropoutMode | None, comparable: bool
) -> None:
    assert set_training_modes(build_dropping(), None, mode) == comparable


def test_functions_are_inlined_in_the_copy_alone() -> None:
    twice = helper.make_function(
        "own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Twice", ["x"], ["y"], domain="own")], "model",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", FLOAT, ["N", 4])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, functions=[twice], opset_imports=opsets)
    copied = copy_original(model)
    assert [node.op_type for node in copied.graph.node] == ["Add"]
    assert [node.op_type for node in model.graph.node] == ["Twice"]
    np.testing.assert_array_equal(run(copied), 2 * DATA)


LEAKY = "Act <alpha: float = 0.3> (a) => (b) { b = LeakyRelu <alpha: float = @alpha> (a) }"
HELD = """Act <alpha: float = 0.3> (a) => (b) {
    c = Constant <value_float: float = @alpha> ()
    d = Mul (a, c)
    b = Max (a, d)
}"""


@pytest.mark.parametrize(
    ("call", "functions", "slope"),
    [
        ("Act", [LEAKY], 0.3),
        ("Act <alpha: float = 0.7>", [LEAKY], 0.7),
        ("Act", [HELD], 0.3),
        ("Out", [LEAKY, "Out (a) => (b) { b = own.Act (a) }"], 0.3),
        (
            "Out",
            [
                LEAKY,
                "Out <alpha: float = 0.6> (a) => (b) { b = own.Act <alpha: float = @alpha> (a) }",
            ],
            0.6,
        ),
        ("Out", [LEAKY, "Out <alpha> (a) => (b) { b = own.Act <alpha: float = @alpha> (a) }"], 0.3),
        ("Out <alpha: float = 0.7>", [LEAKY, "Out <alpha> (a) => (b) { b = own.Act (a) }"], 0.3),
    ],
)
def test_calls_of_functions_have_the_default_attributes(
    call: str, functions: list[str], slope: float
) -> None:
    head = '<ir_version: 9, opset_import: ["" : 18, "own" : 1]>'
    texts = [f'<domain: "own", opset_import: ["" : 18, "own" : 1]> {text}' for text in functions]
    graph = f"model (float[N,4] x) => (float[N,4] y) {{ y = own.{call} (x) }}"
    model = onnx.parser.parse_model("\n".join([head, graph, *texts]))
    expected = np.where(DATA < 0, np.float32(slope) * DATA, DATA)
    session = ort.InferenceSession(model.SerializeToString())
    np.testing.assert_allclose(session.run(None, {"x": DATA})[0], expected, rtol=1e-6)
    np.testing.assert_allclose(run(copy_original(model)), expected, rtol=1e-6)


def test_a_node_that_draws_random_numbers_is_found_in_branches_too() -> None:
    net = Net()
    assert (
        find_random(net.finish({"x": (FLOAT, ["N", 4])}, net.op("Relu", "x", out="y"), 4)) is None
    )
    drawn = helper.make_graph(
        [helper.make_node("RandomNormalLike", ["x"], ["noise"], name="draw")], "then", [],
        [helper.make_tensor_value_info("noise", FLOAT, None)],
    )  # fmt: skip
    net = Net()
    on = net.constant("on", np.array(True))
    model = net.finish(
        {"x": (FLOAT, ["N", 4])},
        net.op("If", on, out="y", then_branch=drawn, else_branch=drawn),
        4,
    )
    assert find_random(model) == "draw"


def test_sizes_that_a_file_declares_wrongly_are_found() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 4, 4), out="h")
    model = net.finish({"x": (FLOAT, ["N", 4])}, net.op("Relu", "h", out="y"), 4)
    found = {"h": np.zeros((3, 4)), "y": np.zeros((3, 4))}
    cases: list[tuple[list[int | str | None], tuple[str, list[int], list[int]] | None]] = [
        (["N", 4], None),
        ([1, 4], None),  # a batch that was freed
        (["N", "width"], None),
        (["N", 7], ("h", [0, 7], [3, 4])),
        ([7], ("h", [7], [3, 4])),
    ]
    for shape, told in cases:
        del model.graph.value_info[:]
        model.graph.value_info.append(helper.make_tensor_value_info("h", FLOAT, shape))
        assert find_false_sizes(model, found) == told
    assert find_false_sizes(model, {"y": found["y"]}) is None
