"""Batches of outputs join into what one batch gives, wherever their samples are, or are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.errors import UsageError
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import MemoryTransport, connect_in_memory

ROWS = 7


def make(nodes: str, output: str, rows: int | str = "N") -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>\n'
        f"g (float[{rows}, 4] x) => (float[{rows}, 2] y, float{output} more)\n"
        f"{{ a = MatMul(x, w) h = Tanh(a) y = MatMul(h, v) {nodes} }}"
    )
    generator = np.random.default_rng(1)
    for name, shape in (("w", (4, 3)), ("v", (3, 2))):
        array = generator.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def give(rows: int = ROWS) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(2).standard_normal((rows, 4)).astype(np.float32)}


@contextmanager
def connected(model: onnx.ModelProto) -> Iterator[tuple[Client, MemoryTransport]]:
    bundle = cut(model, at="h", loss="mse", output="y")
    assert bundle.server is not None
    server = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, server, threads=1) as client:
        yield client, server


def check_equal(model: onnx.ModelProto, found: dict[str, np.ndarray], rows: int = ROWS) -> None:
    """Compare outputs with those of onnx's reference evaluator, which sees all rows at once."""
    expected = ReferenceEvaluator(model).run(None, give(rows))
    for name, array in zip(("y", "more"), expected, strict=True):
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)


JOINABLE = {
    "in front": ("more = Transpose <perm = [1, 0]> (h)", "[3, N]"),
    "as an LSTM's last state": (
        "zero = Constant <value_ints = [0]> () more = Unsqueeze(h, zero)", "[1, N, 3]",
    ),
    "flattened": ("flat = Constant <value_ints = [-1]> () more = Reshape(h, flat)", "[M]"),
}  # fmt: skip
UNJOINABLE = {
    "no axis": ("more = ReduceMean <axes = [0], keepdims = 0> (h)", "[3]"),
    "two axes": ("t = Transpose <perm = [1, 0]> (h) more = MatMul(h, t)", "[N, N]"),
}


@pytest.mark.parametrize(("nodes", "output"), JOINABLE.values(), ids=JOINABLE)
@pytest.mark.parametrize("batch_size", [3, 7])
def test_batches_are_joined_where_the_samples_are(nodes: str, output: str, batch_size: int) -> None:
    model = make(nodes, output)
    with connected(model) as (client, _):
        check_equal(model, client.predict(give(), batch_size=batch_size))


@pytest.mark.parametrize(("nodes", "output"), UNJOINABLE.values(), ids=UNJOINABLE)
def test_what_has_no_single_axis_of_samples_is_refused_before_it_is_computed(
    nodes: str, output: str
) -> None:
    model = make(nodes, output)
    with connected(model) as (client, server):
        sent = server.bytes_sent
        with pytest.raises(UsageError, match=r"'more', F32\[.*--batch-size 7\) or larger"):
            client.predict(give(), batch_size=3)
        with pytest.raises(UsageError, match="one by one with predict_batches"):
            client.predict(iter([give(), give()]))
        assert server.bytes_sent == sent
        check_equal(model, client.predict(give(), batch_size=7))  # as it says
        check_equal(model, client.predict([give()]))
        assert len(list(client.predict_batches(give(), batch_size=3))) == 3


def test_a_fixed_batch_is_joined_where_its_size_is_and_refused_where_it_is_not() -> None:
    front, mean = JOINABLE["in front"][0], UNJOINABLE["no axis"][0]
    model = make(front, "[3, 5]", rows=5)
    with connected(model) as (client, _):
        found = client.predict(give(10), batch_size=5)
    check_equal(make(front, "[3, N]"), found, 10)
    with connected(make(mean, "[3]", rows=5)) as (client, _):
        with pytest.raises(UsageError, match=r"predict 5 rows at a time.*--dim x:0=N"):
            client.predict(give(10), batch_size=5)
        check_equal(make(mean, "[3]"), client.predict(give(5), batch_size=5), 5)
    with connected(make(mean, "[3]")) as (client, _):  # as after --dim x:0=N
        check_equal(make(mean, "[3]"), client.predict(give(10), batch_size=10), 10)
