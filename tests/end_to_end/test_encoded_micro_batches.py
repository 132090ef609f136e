"""Steps of several micro-batches whose crossings are encoded: the same codec for each."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import UsageError
from splitonnx.manifests import WireKind
from splitonnx.names import ACCUMULATE, TRAIN
from splitonnx.optimizers import SGD
from splitonnx.partitioner.cutting.transforms.crossings import encode_crossings
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.wire_codecs import read_wire
from tests.support.zoo import ZOO, Arrays

ENTRY = ZOO["convolutions"]
ROWS = 7


def encode(wire: str, *, u_shaped: bool = False) -> Bundle:
    dims: dict[str, int | str] = {"N": ROWS} if "+ef" in wire else {}
    bundle = cut(
        ENTRY.build(),
        at="r1",
        tail_at="flat" if u_shaped else (),
        loss=ENTRY.loss,
        optimizer=SGD(lr=0.1),
        dims=dims,
    )
    return encode_crossings(bundle, read_wire(wire))


def train(bundle: Bundle, accumulate: int) -> tuple[Arrays, int]:
    """Make two steps; return the state of both parties, and the bytes sent and received."""
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1) as client:
        for seed in range(2):
            client.step(ENTRY.data(ROWS, seed), accumulate=accumulate)
        link.drain()
        return {**client.state(), **link.executor.state()}, link.bytes_sent + link.bytes_received


def measure(found: Arrays, expected: Arrays) -> float:
    """Return the distance of two states."""
    return float(sum(np.sum((found[name] - expected[name]) ** 2) for name in expected) ** 0.5)


@pytest.mark.parametrize("u_shaped", [False, True], ids=["vanilla", "U-shaped"])
@pytest.mark.parametrize("wire", ["fp16", "bf16", "int8", "int4"])
def test_a_codec_s_error_is_not_larger_with_micro_batches(wire: str, u_shaped: bool) -> None:
    exact = train(encode("fp32", u_shaped=u_shaped), 1)[0]
    bundle = encode(wire, u_shaped=u_shaped)
    whole, parts = train(bundle, 1)[0], train(bundle, 3)[0]
    assert measure(parts, exact) <= 1.5 * measure(whole, exact)


def test_what_micro_batches_send_is_encoded() -> None:
    plain, encoded = train(encode("fp32"), 3)[1], train(encode("int8"), 3)[1]
    assert encoded < 0.8 * plain
    manifest = encode("int8").client.manifest
    for phase in (TRAIN, ACCUMULATE):
        sent = [w for w in manifest.phase(phase).wires if w.kind is WireKind.ACTIVATION]
        assert {wire.tensor.dtype for wire in sent} == {"I8", "F32"}  # codes and scales


def test_micro_batches_do_not_share_what_error_feedback_keeps() -> None:
    bundle = encode("bwd=topk=0.5+ef,fwd=fp32")
    with pytest.raises(UsageError, match=r"cannot accumulate: its codec keeps .*without \+ef"):
        train(bundle, 2)
