"""What a party needs, against sizes that are counted by hand and against what it holds."""

from __future__ import annotations

import onnx
import pytest

from splitonnx.manifests import Source
from splitonnx.messages import TaskKey
from splitonnx.names import TRAIN
from splitonnx.partitioner.cutting.transforms.crossings import encode_crossings
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.memory.estimates import PartyMemory, measure_bundle
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.wire_codecs import read_wire
from tests.support.carried import close
from tests.support.nets import FLOAT, Net
from tests.support.zoo import ZOO

ROWS = 5


def build_layers() -> onnx.ModelProto:
    """Four layers of 6, 8, 7 and 3 units behind 4 numbers, with a Tanh after the first two."""
    net = Net()
    a = net.op("Tanh", net.op("MatMul", "x", net.weight("w0", 4, 6), out="l0"), out="a")
    b = net.op("Tanh", net.op("MatMul", a, net.weight("w1", 6, 8), out="l1"), out="b")
    c = net.op("MatMul", b, net.weight("w2", 8, 7), out="c")
    net.op("MatMul", c, net.weight("w3", 7, 3), out="y")
    return close(net, {"x": (FLOAT, ["N", 4])}, {"y": (FLOAT, ["N", 3])})


def find(bundle_memory: tuple[PartyMemory, ...], party: str) -> PartyMemory:
    return next(memory for memory in bundle_memory if memory.party == party)


def test_a_party_s_memory_is_what_its_tensors_take() -> None:
    found = check(build_layers(), at=["b"], batch=ROWS).memory
    client = find(found, "client")
    weights = 4 * (4 * 6 + 6 * 8)
    assert client.parameters == client.gradients == weights
    assert client.optimizer == 2 * weights  # AdamW's two moments
    wire = 4 * ROWS * 8
    assert client.wires == 2 * wire + 8 * ROWS + 4 * 2  # labels, loss and accuracy
    assert client.stash == 4 * ROWS * (6 + 8)  # Tanh's results, of which the second is sent
    assert client.stash_recomputed == 0
    assert client.waiting == 3 * weights + client.stash + client.wires
    assert client.waiting_recomputed == client.waiting - client.stash
    server = find(found, "server")
    assert server.stash == server.stash_recomputed == 0  # forward and backward are one stage
    assert server.peak == 2 * 3 * server.gradients + server.gradients


@pytest.mark.parametrize("wire", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["convolutions", "batchnorm_trained", "dropout", "attention"])
def test_the_stash_is_what_an_executor_holds_while_it_waits(name: str, wire: str) -> None:
    entry = ZOO[name]
    cuts = [found.tensor for found in check(entry.build(), loss=entry.loss).cuts]
    at = cuts[len(cuts) // 2]
    bundle = encode_crossings(
        cut(entry.build(), at=at, loss=entry.loss, check=False), read_wire(wire)
    )
    executor = Executor(bundle.client, Engine(threads=1))
    key = TaskKey("a" * 32, TRAIN, 0, 0)
    executor.begin(key, data=entry.data(ROWS), seed=0, learning_rate=0.1)
    list(executor.advance(key))
    phase = bundle.client.manifest.phase(TRAIN)
    read = {i.name for s in phase.stages for i in s.inputs if i.source is Source.STASH}
    held = {n: executor._engine.to_array(t) for n, t in executor._tasks[key].values.items()}
    expected = sum(array.nbytes for name, array in held.items() if name in read)
    assert find(measure_bundle(bundle, ROWS), "client").stash == expected > 0


def test_a_size_that_is_not_known_leaves_the_sum_unknown() -> None:
    net = Net()
    hidden = net.op("Tanh", net.op("MatMul", "x", net.weight("v", 4, 6), out="m"), out="h")
    net.op("MatMul", hidden, net.weight("w", 6, 3), out="y")
    model = close(net, {"x": (FLOAT, ["N", "T", 4])}, {"y": (FLOAT, ["N", "T", 3])})
    (client, _) = check(model, loss="mse", at=["h"], batch=2).memory
    assert (client.stash, client.wires, client.waiting, client.peak) == (None,) * 4
    assert client.parameters == 96


def test_without_a_cut_no_memory_is_estimated() -> None:
    assert check(build_layers()).memory == ()
