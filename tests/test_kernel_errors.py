"""Errors of ONNX Runtime as sentences: the node and the reason, without its source."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from splitonnx.kernel_errors import describe_kernel_error

TABLE = np.ones((2, 3), np.float32)
FAILING = {
    "y = MatMul (x, w)": "MatMul dimension mismatch",
    "y = Add (x, w)": "Attempting to broadcast an axis by a dimension other than 1. 3 by 5",
    "y = Concat <axis = 0> (x, w)": "Non concat axis dimensions must match: Axis 1 has mismatched "
    "dimensions of 5 and 3",
    "k = Constant <value_ints = [7]> ()  y = Gather (x, k)": "indices element out of data bounds, "
    "idx=7 must be within the inclusive range [-2,1]",
    "k = Constant <value_ints = [7, 3]> ()  y = Reshape (x, k)": "The input tensor cannot be "
    "reshaped to the requested shape. Input shape:{2,3}, requested shape:{7,3}",
    "k = Constant <value_ints = [0]> ()  y = Squeeze (x, k)": "Dimension of input 0 must be 1 "
    "instead of 2. shape={2,3}",
}


def fail(body: str, declared: str = "float[a, b] x, float[c, d] w") -> str:
    """Run a model whose last node is named ``the node``, and return the error's text."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 18]>
        failing ({declared}) => (float[e, f] y) {{ {body} }}"""
    )
    model.graph.node[-1].name = "the node"
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    with pytest.raises(Exception, match="ONNXRuntimeError") as caught:
        session.run(None, {"x": TABLE, "w": np.ones((2, 5), np.float32)})
    return str(caught.value)


@pytest.mark.parametrize("body", FAILING)
def test_a_node_that_fails_is_named_with_the_reason_alone(body: str) -> None:
    kind = body.split("y = ")[1].split()[0]
    assert describe_kernel_error(fail(body)) == f"node 'the node' ({kind}) fails: {FAILING[body]}"


def test_a_node_in_a_branch_is_named_behind_the_node_that_holds_it() -> None:
    body = """k = Constant <value_ints = [7]> ()  c = Constant <value = bool {1}> ()  y = If (c) <
        then_branch = one () => (float[e, f] g) { g = Gather (x, k) },
        else_branch = two () => (float[e, f] h) { h = Identity (x) }>"""
    told = describe_kernel_error(fail(body))
    assert told.startswith("node 'the node' (If) fails: a node (Gather) fails: indices element")


def test_a_graph_s_input_of_another_size_is_named_with_its_axes() -> None:
    text = fail("y = Add (x, w)", "float[4, 3] x, float[a, b] w")
    assert describe_kernel_error(text) == (
        "input 'x' has other sizes than the graph declares: axis 0 is 2, not 4"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while "
            "running Loop node. Name:'' Status Message: /src/core/loop.cc:12 static void "
            "onnxruntime::(anonymous namespace)::Read(const int&, std::function<void(int)>) const "
            "[with T = float] it does not end\n",
            "a node (Loop) fails: it does not end",
        ),
        ("/src/a.h:5 void f(int) size == 1 was false. ", "size == 1 was false."),
        (
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: "
            "/src/core/nn/lrn.h:22 onnxruntime::LRN<T>::LRN(const onnxruntime::OpKernelInfo&) "
            "[with T = float] size_ % 2 == 1 was false. \n",
            "a node cannot be loaded: size_ % 2 == 1 was false.",
        ),
        ("the session is closed", "the session is closed"),
        ("it reads model.onnx:3 lines", "it reads model.onnx:3 lines"),
        ("", ""),
    ],
)
def test_what_else_is_said_keeps_its_words(text: str, told: str) -> None:
    assert describe_kernel_error(text) == told
