"""How much memory a task takes, as estimated before it is begun."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from splitonnx.bundles import Bundle
from splitonnx.manifests import Phase, Source, Wire, WireKind
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine import estimates as module
from splitonnx.runtime.engine.estimates import FIXED, FRAGMENTATION, Estimates
from splitonnx.tensors import TensorSpec
from tests.support import tiny
from tests.support.zoo import ZOO


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


@pytest.fixture(scope="module")
def estimates(bundle: Bundle) -> Estimates:
    assert bundle.server is not None
    return Estimates(bundle.server.manifest, bundle.server.graphs)


def test_the_estimate_grows_with_the_batch_alone(estimates: Estimates) -> None:
    small, large = (estimates.measure("train", {"N": rows}) - FIXED for rows in (1000, 2000))
    assert 1.9 < large / small < 2.1
    assert estimates.measure("predict", {"N": 1000}) - FIXED < small


def test_what_waits_until_the_reply_has_left_is_counted(
    bundle: Bundle, estimates: Estimates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of activations are held until those of the weights are computed from them."""
    monkeypatch.setattr(module, "find_first", lambda *_: frozenset())
    assert bundle.server is not None
    at_once = Estimates(bundle.server.manifest, bundle.server.graphs)
    assert estimates.measure("predict", {"N": 1000}) == at_once.measure("predict", {"N": 1000})
    assert estimates.measure("train", {"N": 1000}) > at_once.measure("train", {"N": 1000})


def test_a_dimension_that_inference_does_not_know_counts_as_the_batch() -> None:
    """Resize, whose batch is not declared, makes the largest value of this model's prediction."""
    party = cut(ZOO["upsampling"].build(), at=None).client
    needed = Estimates(party.manifest, party.graphs).measure("predict", {"N": 4096})
    assert needed > 2 * 4096 * 3 * 18 * 24 * 4  # what Resize gives, and Tanh after it


# --- by hand ----------------------------------------------------------------------------------

FLOAT = TensorProto.FLOAT


def shaped(name: str, *dims: int | str, dtype: int = FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, dims)


def measure(
    nodes: list[NodeProto],
    values: list[ValueInfoProto],
    sizes: dict[str, int],
    **weights: np.ndarray,
) -> int:
    """Estimate one stage from ``x`` (N, 3, 8, 8) to ``y``, without what every task takes."""
    stage = tiny.make_stage("s", {"x": Source.DATA}, ("y",))
    x = TensorSpec(name="x", dtype="F32", shape=("N", 3, 8, 8))
    phase = Phase(name="predict", data=(x,), stages=(stage,), results=("y",))
    manifest = tiny.make_party("client", (phase,), {"s": nodes}, {}).manifest
    graph = helper.make_graph(
        nodes,
        "s",
        [shaped("x", "N", 3, 8, 8)],
        [v for v in values if v.name == "y"] or [ValueInfoProto(name="y")],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        value_info=[v for v in values if v.name != "y"],
    )
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    found = Estimates(manifest, {"s.onnx": content.SerializeToString()}).measure("predict", sizes)
    return found - FIXED


def scaled(size: float) -> int:
    return int(size * FRAGMENTATION)


IMAGE = 4 * 3 * 8 * 8
"""Bytes of one sample of ``x``."""
CHAIN = [
    helper.make_node("Relu", ["x"], ["a"]),
    helper.make_node("Relu", ["a"], ["b"]),
    helper.make_node("Relu", ["b"], ["c"]),
    helper.make_node("Relu", ["c"], ["y"]),
]
SAME = [shaped(name, "N", 3, 8, 8) for name in "abcy"]


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_a_value_is_held_from_its_node_to_its_last_use(rows: int) -> None:
    """Beside the data there are two values at a time, however long the chain."""
    assert measure(CHAIN, SAME, {"N": rows}) == scaled(3 * IMAGE * rows)


def test_what_is_needed_later_is_held_until_then() -> None:
    residual = [*CHAIN[:3], helper.make_node("Add", ["a", "c"], ["y"])]
    assert measure(residual, SAME, {"N": 2}) == scaled(4 * IMAGE * 2)


def test_what_only_looks_at_another_s_memory_takes_none() -> None:
    views = [
        CHAIN[0],
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("Identity", ["b"], ["c"]),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    assert measure(views, SAME, {"N": 2}) == scaled(3 * IMAGE * 2)


def test_a_convolution_spreads_one_image_into_columns_and_weights_are_not_counted() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])]
    weight = np.zeros((5, 3, 3, 3), np.float32)
    columns = 4 * 3 * 3 * 3 * 8 * 8
    found = measure(nodes, [shaped("y", "N", 5, 8, 8)], {"N": 4}, w=weight)
    assert found == scaled(4 * (IMAGE + 4 * 5 * 8 * 8) + columns)


def test_a_convolution_that_may_run_in_blocks_has_a_copy_of_its_larger_image() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])]
    weight = np.zeros((16, 3, 3, 3), np.float32)
    made = 4 * 4 * 16 * 8 * 8
    found = measure(nodes, [shaped("y", "N", 16, 8, 8)], {"N": 4}, w=weight)
    assert found == scaled(4 * IMAGE + made + made)


def test_an_expression_of_dimensions_is_computed() -> None:
    nodes = [helper.make_node("Tile", ["x", "r"], ["y"])]
    repeats = np.array([2, 1, 1, 1])
    found = measure(nodes, [shaped("y", "2*N", 3, 8, 8)], {"N": 4}, r=repeats)
    assert found == scaled(3 * IMAGE * 4)


def test_without_a_shape_a_value_is_as_large_as_what_it_is_made_of_or_as_the_largest() -> None:
    nodes = [
        helper.make_node("Concat", ["x", "x"], ["a"], axis=1),
        helper.make_node("MaxPool", ["a"], ["b"], kernel_shape=[8, 8]),
        helper.make_node("Resize", ["b"], ["c"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    known = [shaped("a", "N", 6, 8, 8), shaped("b", "N", 6, 1, 1)]
    kept = measure([*nodes[:2], nodes[3]], known, {"N": 4})
    unknown = [*nodes[:3], helper.make_node("Relu", ["c"], ["y"])]
    small = 4 * 6
    assert kept == scaled(4 * (IMAGE + 2 * IMAGE + small))
    assert measure(unknown, known, {"N": 4}) == scaled(4 * (IMAGE + 4 * IMAGE))


def test_halves_count_as_they_are_computed_with_widened_beside() -> None:
    half = TensorProto.FLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=half),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    values = [shaped(name, "N", 3, 8, 8, dtype=half) for name in "ay"]
    assert measure(nodes, values, {"N": 2}) == scaled(2 * (IMAGE + 2 * IMAGE * 6 / 4))


def test_a_dimension_below_1_counts_as_nothing() -> None:
    nodes = [helper.make_node("Slice", ["x"], ["y"])]
    assert measure(nodes, [shaped("y", "N + -9", 3, 8, 8)], {"N": 2}) == scaled(2 * IMAGE)


def test_every_task_takes_something(estimates: Estimates) -> None:
    assert estimates.measure("train", {"N": 0}) >= FIXED


STAGES = {"first": ("x", "a"), "second": ("a", "b"), "third": ("x", "y")}
"""What each takes and makes; ``b`` is one number a sample."""


def write(taken: str, made: str) -> bytes:
    node = helper.make_node("ReduceSum" if made == "b" else "Relu", [taken], [made])
    values = [shaped(n, *(("N",) if n == "b" else ("N", 3, 8, 8))) for n in (taken, made)]
    graph = helper.make_graph([node], "s", values[:1], values[1:])
    content: bytes = helper.make_model(graph).SerializeToString()
    return content


@pytest.mark.parametrize("is_sent", [False, True])
def test_what_is_sent_is_kept_beside_the_stages_after_it(is_sent: bool) -> None:
    """The reply may still be on its way while the update runs."""
    sources = {"x": Source.DATA, "a": Source.STASH}
    stages = tuple(
        tiny.make_stage(name, {taken: sources[taken]}, (made,))
        for name, (taken, made) in STAGES.items()
    )
    x, a = (TensorSpec(name=name, dtype="F32", shape=("N", 3, 8, 8)) for name in "xa")
    sent = Wire(tensor=a, sender="client", receiver="server", kind=WireKind.ACTIVATION)
    phase = Phase(
        name="predict", data=(x,), stages=stages, wires=(sent,) if is_sent else (), results=("y",)
    )
    nodes: dict[str, list[NodeProto]] = {name: [] for name in STAGES}
    manifest = tiny.make_party("client", (phase,), nodes, {}).manifest
    graphs = {f"{name}.onnx": write(*values) for name, values in STAGES.items()}
    found = Estimates(manifest, graphs).measure("predict", {"N": 5})
    assert found - FIXED == scaled(5 * (3 * IMAGE if is_sent else 2 * IMAGE + 4))


def test_weights_that_are_turned_once_a_step_are_counted_in_its_micro_batches() -> None:
    """They are kept between the runs of a stage; a step of one batch frees them in the run."""
    turned = helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0, 2, 3])
    nodes = [turned, helper.make_node("Conv", ["x", "turned"], ["y"])]
    stage = tiny.make_stage("s", {"x": Source.DATA, "w": Source.STATE}, ("y",))
    x = TensorSpec(name="x", dtype="F32", shape=("N", 30, 3, 3))
    phases = [Phase(name=n, data=(x,), stages=(stage,), results=("y",))
              for n in ("train", "accumulate")]  # fmt: skip
    values = [shaped("x", "N", 30, 3, 3), shaped("w", 30, 50, 3, 3)]
    made = [shaped("turned", 50, 30, 3, 3)]
    output = [shaped("y", "N", 50, 1, 1)]
    graph = helper.make_graph(nodes, "s", values, output, value_info=made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    server = tiny.make_party("server", tuple(phases[:1]), {"s": nodes}, {}).manifest
    manifest = replace(server, phases=tuple(phases))
    estimates = Estimates(manifest, {"s.onnx": model.SerializeToString()})
    train, adding = (estimates.measure(phase.name, {"N": 1}) - FIXED for phase in phases)
    assert train > 4 * 50 * 30 * 9
    assert adding == pytest.approx(train + scaled(4 * 50 * 30 * 9), abs=1)
