"""The node with which ONNX Runtime cannot load a model is found, though its error names none."""

from __future__ import annotations

import onnx
import pytest

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.native import natives
from splitonnx.partitioner.native.loadings import find_unloadable, is_unloadable
from splitonnx.partitioner.native.workers import Refused, call
from splitonnx.partitioner.partitions import cut

BAD = {
    "a Resize": 'Resize <mode = "nearest", antialias = 1> (h, , halves)',
    "a size": "LRN <size = 2> (h)",
    "a mode": 'DepthToSpace <blocksize = 1, mode = "X"> (h)',
    "a branch": """If (yes) <
        then_branch = one () => (float[N, 3, a, b] t) { t = LRN <size = 2> (h) },
        else_branch = two () => (float[N, 3, a, b] e) { e = Tanh (h) }>""",
}


def build(node: str) -> onnx.ModelProto:
    model: onnx.ModelProto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 18]>
        net (float[N, 2, 6, 6] x, bool yes) => (float[N, 3] y)
        <float[3, 2, 1, 1] k = {{1, 2, 3, 4, 5, 6}}, float[4] halves = {{1, 1, 0.5, 0.5}}> {{
            h = Conv (x, k)
            r = {node}
            s = Sigmoid (r)
            p = GlobalAveragePool (s)
            y = Flatten (p)
        }}"""
    )
    for made in model.graph.node:
        made.name = f"{made.output[0]}_node"
    return model


@pytest.mark.parametrize("case", BAD)
def test_it_is_found_in_the_middle_of_a_model(case: str) -> None:
    content = build(BAD[case]).SerializeToString()
    with pytest.raises(Refused) as caught:
        call(natives.run_session, "the model", content, [], "none")
    assert is_unloadable(caught.value)
    node = find_unloadable(content, "the model")
    assert node is not None
    assert node.name == "r_node"


def test_a_model_that_loads_has_none_and_neither_has_another_error() -> None:
    assert find_unloadable(build("Tanh (h)").SerializeToString(), "the model") is None
    broken = build("Tanh (nowhere)").SerializeToString()
    with pytest.raises(Refused) as caught:
        call(natives.run_session, "the model", broken, [], "none")
    assert not is_unloadable(caught.value)


@pytest.mark.parametrize("case", ["a Resize", "a size", "a mode"])
def test_a_model_that_no_party_could_load_is_refused_by_cut_with_the_node(case: str) -> None:
    model = build(BAD[case])
    with pytest.raises(UnsupportedModel) as caught:
        cut(model, at="h", check=True)
    sentence = str(caught.value)
    assert f"node 'r_node' ({model.graph.node[1].op_type}) cannot be loaded: " in sentence
    assert "export the model with other attributes of this node" in sentence
    assert "onnxruntime" not in sentence
