"""Whatever is told of a wire's dimensions is refused, or answered rightly; nobody dies of it.

A batch without rows ended the server by SIGFPE, and a gradient of another shape than its
activation read what other sessions had left in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import ArrayMismatch, FormatError, RemoteFault
from splitonnx.manifests import PartyManifest
from splitonnx.messages import TaskKey
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from tests.support import forked_cases, tiny
from tests.support.zoo import FLOAT, INT64, ZOO, Arrays, Net

ENGINE = Engine(threads=1)


@pytest.fixture(scope="module")
def try_model() -> Iterator[forked_cases.Run]:
    """Try a model in a process of its own, since a fault ends it."""
    with forked_cases.forking("tests.support.wire_shapes") as run:
        yield run


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("extent", [[], pytest.param(["--every"], marks=pytest.mark.sweep)])
def test_a_wrong_dimension_is_refused_on_either_side(
    name: str, extent: list[str], try_model: forked_cases.Run
) -> None:
    done = try_model(name, *extent)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    ends = json.loads(done.stdout)
    assert ends["server ArrayMismatch"] > ends["cuts"]
    assert ends["client ArrayMismatch"] > ends["cuts"]
    allowed = {"ArrayMismatch", "RemoteProtocolError", "StageFailed", "accepted"}
    assert {key.split()[-1] for key in ends} <= {"model", "cuts", *allowed}


def build_conv_chain() -> onnx.ModelProto:
    """Convolutions of images of any size: the sizes between them have no names of their own."""
    net = Net()
    value = net.op("Conv", "x", net.weight("w1", 4, 2, 3, 3), out="c1")
    value = net.op("Relu", value, out="r1")
    value = net.op("Conv", value, net.weight("w2", 4, 4, 1, 1), out="c2")
    value = net.op("Relu", value, out="r2")
    value = net.op("Flatten", net.op("GlobalAveragePool", value, out="pool"), out="flat")
    output = net.op("MatMul", value, net.weight("w3", 4, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 2, "H", "W"])}, output, 3)


def cut_conv_chain() -> Bundle:
    return cut(build_conv_chain(), at="r1", tail_at="r2")


def begin(executor: Executor, data: Arrays | None = None, phase: str = "train") -> TaskKey:
    key = TaskKey("s", phase, 0, 0)
    executor.begin(key, data=data or {}, seed=0, learning_rate=0.1)
    return key


def test_no_dimension_of_a_wire_is_without_a_name() -> None:
    bundle = cut_conv_chain()
    for party in bundle.parties.values():
        for phase in party.manifest.phases:
            for wire in phase.wires:
                assert None not in wire.tensor.shape, wire
    wires = {w.tensor.name: w.tensor.shape for w in bundle.client.manifest.phase("train").wires}
    for name, shape in wires.items():
        assert wires.get(f"{name}_grad", shape) == shape


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 64, 64), (1, 4, 5, 6), (2, 4, 6, 6)])
def test_a_gradient_has_the_shape_of_its_activation(shape: tuple[int, ...]) -> None:
    server = Executor(cut_conv_chain().parties["server"], ENGINE)
    key = begin(server)
    server.deliver(key, {"r1@server": np.ones((1, 4, 6, 6), np.float32)})
    (sent,) = server.advance(key)
    assert sent["r2@client"].shape == (1, 4, 6, 6)
    with pytest.raises(ArrayMismatch, match="the gradient of 'r2'"):
        server.deliver(key, {"r2@client_grad": np.zeros(shape, np.float32)})
    server.deliver(key, {"r2@client_grad": np.zeros((1, 4, 6, 6), np.float32)})
    list(server.advance(key))


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 64, 64), (2, 4, 6, 6), (0, 4, 6, 6)])
def test_a_client_believes_no_shape_but_its_own(shape: tuple[int, ...]) -> None:
    client = Executor(cut_conv_chain().client, ENGINE)
    data: Arrays = {"x": np.ones((1, 2, 8, 8), np.float32), "labels": np.zeros(1, np.int64)}
    key = begin(client, data)
    (sent,) = client.advance(key)
    assert sent["r1@server"].shape == (1, 4, 6, 6)
    with pytest.raises(ArrayMismatch):
        client.deliver(key, {"r1@server_grad": np.zeros(shape, np.float32)})


@pytest.mark.parametrize("phase", ["train", "predict"])
def test_a_batch_without_rows_is_refused_before_anything_runs(phase: str) -> None:
    server = Executor(tiny.split_bundle().parties["server"], ENGINE)
    key = begin(server, phase=phase)
    with pytest.raises(ArrayMismatch, match="without an empty dimension"):
        server.deliver(key, {"h": np.zeros((0, 4), np.float32)})


def test_an_empty_axis_beside_a_huge_one_is_refused() -> None:
    bundle = cut(ZOO["shape_paths"].build(), at="t1")
    assert bundle.server is not None
    server = Executor(bundle.server, ENGINE)
    for shape in ((4_000_000, 0, 8), (0, 4_000_000, 8)):
        with pytest.raises(ArrayMismatch):
            server.deliver(begin(server), {"t1@server": np.zeros(shape, np.float32)})
        server.abandon(TaskKey("s", "train", 0, 0))


@pytest.mark.parametrize("verb", ["step", "predict", "evaluate", "fit"])
def test_data_without_rows_are_refused_before_anything_is_sent(verb: str) -> None:
    bundle = tiny.split_bundle()
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, ENGINE))
    batch = {name: array[:0] for name, array in tiny.batch(0).items()}
    with Client(bundle.client, link, threads=1) as client:
        before = link.bytes_sent
        with pytest.raises(ArrayMismatch, match="without an empty dimension"):
            getattr(client, verb)(batch if verb == "step" else [batch])
        assert link.bytes_sent == before


def test_a_bundle_with_a_nameless_dimension_is_to_be_cut_again(tmp_path: Path) -> None:
    bundle = tiny.split_bundle()
    manifest = msgspec.json.encode(bundle.client.manifest).replace(b'"N",4', b"null,4")
    bundle.save(tmp_path / "bundle")
    (tmp_path / "bundle" / "client" / "manifest.json").write_bytes(manifest)
    with pytest.raises(FormatError, match=r"wire 'h' of phase 'train' .* cut the model again"):
        PartyBundle.load(tmp_path / "bundle" / "client")


def build_finder() -> onnx.ModelProto:
    """A model whose second output lists the scores above 5."""
    net = Net()
    value = net.op("Relu", net.op("MatMul", "x", net.weight("w1", 4, 6), out="m"), out="h")
    scores = net.op("MatMul", value, net.weight("w2", 6, 3), out="scores")
    above = net.op("Greater", scores, net.constant("five", np.array(5, np.float32)), out="above")
    found = net.op("NonZero", above, out="found")
    graph = helper.make_graph(
        net.nodes,
        "finder",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 4])],
        [
            helper.make_tensor_value_info(scores, FLOAT, ["N", 3]),
            helper.make_tensor_value_info(found, INT64, [2, None]),
        ],
        net.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_a_prediction_may_have_found_nothing() -> None:
    bundle = cut(build_finder(), at="h", output="scores")
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, ENGINE))
    with Client(bundle.client, link, threads=1) as client:
        nothing = client.predict({"x": np.zeros((2, 4), np.float32)})
        assert nothing["found"].shape == (2, 0)
        assert nothing["scores"].shape == (2, 3)
        much = client.predict({"x": np.full((2, 4), 1e3, np.float32)})
        assert much["found"].shape[1] > 0


def test_what_a_kernel_reads_is_never_empty_though_it_depends_on_values() -> None:
    bundle = cut(build_finder(), at="h", output="scores")
    assert bundle.server is not None
    server, client = (
        replace(
            part,
            manifest=msgspec.json.decode(
                msgspec.json.encode(part.manifest).replace(
                    b'"kind":"output"', b'"kind":"activation"'
                ),
                type=PartyManifest,
            ),
        )
        for part in (bundle.server, bundle.client)
    )
    link = connect_in_memory(Executor(server, ENGINE))
    with (
        Client(client, link, threads=1) as one,
        pytest.raises(RemoteFault, match=r"'found' should be .* without an empty dimension"),
    ):
        one.predict({"x": np.zeros((2, 4), np.float32)})
