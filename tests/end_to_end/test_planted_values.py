"""What a kernel may read beyond its input never holds another owner's values.

onnxruntime-training 1.19.2 reads beyond a gradient that is smaller than its activation.  The shapes
of wires are checked, so that none arrives; here they are not, and each owner's process is what
keeps the values apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec
import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from splitonnx.bundles import PartyBundle
from splitonnx.errors import SplitonnxError
from splitonnx.manifests import Phase, Wire
from splitonnx.messages import TaskKey
from splitonnx.partitioner.lowerings.kernels import choices
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine.builds.installed import installed_runtime
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.models import SessionExecutor
from splitonnx.runtime.workers.pools import WorkerPool
from splitonnx.runtime.workers.processes import WorkerOptions

PLANTED = np.float32(-31337.625)
SHAPE = (1, 4, 32, 32)


def build() -> ModelProto:
    """Conv, Relu, Conv 1x1, Relu, pool, MatMul; the image's sides are not known."""
    random = np.random.default_rng(0)
    weights = {"w1": (4, 2, 3, 3), "w2": (4, 4, 1, 1), "w3": (4, 3)}
    values = {name: random.standard_normal(shape) for name, shape in weights.items()}
    values["w2"] = np.eye(4).reshape(4, 4, 1, 1)  # it hands gradients through as they are
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], pads=[1, 1, 1, 1], name="c1"),
        helper.make_node("Relu", ["c1"], ["r1"], name="r1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="c2"),
        helper.make_node("Relu", ["c2"], ["r2"], name="r2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
        helper.make_node("MatMul", ["flat", "w3"], ["logits"], name="logits"),
    ]
    graph = helper.make_graph(
        nodes,
        "beyond",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, "H", "W"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def unbind(party: PartyBundle) -> PartyBundle:
    """Let every wire have any shape of its rank."""

    def free(wire: Wire) -> Wire:
        name = "".join(c for c in wire.tensor.name if c.isalnum())
        dims = tuple(f"{name}{axis}" for axis in range(len(wire.tensor.shape)))
        return msgspec.structs.replace(
            wire, tensor=msgspec.structs.replace(wire.tensor, shape=dims)
        )

    def loosen(phase: Phase) -> Phase:
        return msgspec.structs.replace(phase, wires=tuple(free(wire) for wire in phase.wires))

    phases = tuple(loosen(phase) for phase in party.manifest.phases)
    manifest = msgspec.structs.replace(party.manifest, phases=phases)
    return PartyBundle(manifest=manifest, graphs=party.graphs, weights=party.weights)


@pytest.fixture(scope="module")
def party() -> PartyBundle:
    """The server's part with the kernels that read beyond; those that are chosen now do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices, "_CHOICES", {})
        bundle = cut(build(), at="r1", tail_at="r2")
    assert bundle.server is not None
    return unbind(bundle.server)


def step(
    executor: SessionExecutor, activation: np.ndarray, gradient: np.ndarray
) -> Iterator[Mapping[str, np.ndarray]]:
    """Take a training step past the protocol; yield what would be sent."""
    key = TaskKey("0" * 32, "train", executor.step, 0)
    executor.begin(key, data={}, seed=0, learning_rate=0.0)
    try:
        executor.deliver(key, {"r1@server": activation})
        for wires in executor.advance(key):
            yield {name: array.copy() for name, array in wires.items()}
        executor.deliver(key, {"r2@client_grad": gradient})
        for wires in executor.advance(key):
            yield {name: array.copy() for name, array in wires.items()}
        executor.finish(key)
    except SplitonnxError:  # ONNX Runtime saw it itself
        executor.abandon(key)


def count_planted(victim: SessionExecutor, spy: SessionExecutor) -> int:
    """Let one plant values, and count those that the other is given."""
    ones = np.full(SHAPE, np.float32(1))  # so that Relu lets every gradient through
    found = 0
    for _ in range(5):
        for _ in step(victim, ones, np.full(SHAPE, PLANTED)):
            pass
        gradient = np.full(SHAPE, PLANTED).reshape(-1)[:4].reshape(1, 4, 1, 1)
        gradient[:] = 0  # with values behind it that another owner left there
        for wires in step(spy, ones, gradient):
            found += sum(int((array == PLANTED).sum()) for array in wires.values())
    return found


def test_the_kernels_do_read_beyond_a_small_gradient(party: PartyBundle) -> None:
    """The reason for all this; on loopback without tokens the checks of shapes alone prevent it."""
    engine = Engine(threads=1)
    engine._shared = None  # an arena of the stage's own gives the same memory again
    base = Executor(party, engine)
    base.prepare("train")
    if not installed_runtime().training:
        pytest.skip("the kernels of the training build")
    assert count_planted(base.fork(), base.fork()) > 0


def test_no_owner_is_given_what_another_owner_planted(party: PartyBundle) -> None:
    """On earlier versions 3,968 of 4,096 values of another owner's gradient came back."""
    options = WorkerOptions(
        party=party, threads=1, provider="cpu", stage_seconds=60.0, memory_bytes=None, kept_bytes=0
    )
    pool = WorkerPool(options, workers=2)
    try:
        victim = pool.open("ana", "a" * 32, None, 0)
        spy = pool.open("ben", "b" * 32, None, 0)
        assert count_planted(victim, spy) == 0
        assert victim.step == 5  # it did plant them
        assert not victim.is_lost
    finally:
        pool.close()
