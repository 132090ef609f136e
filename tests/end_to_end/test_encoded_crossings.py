"""Encoded crossings, from end to end: peers that lie in codes, real servers, and fewer bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest
from sklearn.datasets import load_digits

import splitonnx
from splitonnx.bundles import Bundle
from splitonnx.errors import NormTooLarge, NotFinite, SplitonnxError
from splitonnx.messages import Fault, Message, TaskKey, Tensors, decode_message, encode_message
from splitonnx.names import PREDICT, TRAIN
from splitonnx.partitioner.cutting.transforms.crossings import encode_crossings
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.channels.channels import Channel
from splitonnx.runtime.channels.websockets import connect
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.server.servers import Server
from splitonnx.wire_codecs import read_wire
from tests.support.callers import Caller, make_task
from tests.support.links import make_bundle
from tests.support.zoo import FLOAT, ZOO, Net

LARGEST = float(np.finfo(np.float32).max)
ROWS, WIDTH = 2, 100
"""Of what crosses the cut of the convolutions at r1: 4 channels of 5 by 5."""
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def encode(wire: str, name: str = "convolutions", at: str = "r1") -> Bundle:
    return encode_crossings(make_bundle(name, at), read_wire(wire))


def honest(wire: str) -> dict[str, np.ndarray]:
    """Return what a client sends in its first message of a step."""
    executor = Executor(encode(wire).client, Engine(threads=1))
    data = ZOO["convolutions"].data(ROWS)
    executor.begin(make_task().key, data=data, seed=0, learning_rate=1e-3)
    (sent,) = executor.advance(make_task().key)
    return sent


def tell(wire: str, changed: Mapping[str, np.ndarray], *, phase: str = TRAIN) -> Message:
    """Send a step's first message with some tensors changed, and return the answer."""
    caller = Caller(encode(wire))
    tensors = {**honest(wire), **changed}
    if phase == PREDICT:
        del tensors["labels@server"]
    task = msgspec.structs.replace(make_task(), phase=phase)
    (reply,) = caller.dispatcher.handle(b"".join(encode_message(task, tensors)))
    answer, _ = decode_message(b"".join(reply))
    assert caller.step == (isinstance(answer, Tensors) and phase == TRAIN)
    return answer


def fill(shape: tuple[int, ...], value: float, dtype: str = "f4") -> np.ndarray:
    return np.full(shape, value, dtype)


@pytest.mark.parametrize(
    ("wire", "changed", "subject"),
    [
        ("int8", {"r1@server#scale": fill((1, 4), np.nan)}, "r1@server#scale"),
        ("int8", {"r1@server#scale": fill((1, 4), np.inf)}, "r1@server#scale"),
        ("fp16", {"r1@server#fp16": fill((2, 4, 5, 5), np.inf, "f2")}, "r1@server#fp16"),
        ("topk=0.1", {"r1@server#values": fill((2, 10), np.nan)}, "r1@server#values"),
        ("int4", {"r1@server#scale": fill((2, 2), np.nan)}, "r1@server#scale"),
        # finite numbers on the wire that are not finite when they are decoded
        (
            "int8",
            {
                "r1@server#scale": fill((1, 4), LARGEST),
                "r1@server#int8": fill((2, 4, 5, 5), 9, "i1"),
            },
            "r1@server",
        ),
        ("bf16", {"r1@server#bf16": fill((2, 4, 5, 5), 0x7F80, "u2")}, "r1@server"),
        ("bf16", {"r1@server#bf16": fill((2, 4, 5, 5), 0xFFC1, "u2")}, "r1@server"),
        (
            "int4",
            {"r1@server#scale": fill((2, 2), LARGEST), "r1@server#int4": fill((2, 64), 0, "u1")},
            "r1@server",
        ),
    ],
)
def test_what_is_not_finite_is_refused_before_the_step_encoded_or_decoded(
    wire: str, changed: dict[str, np.ndarray], subject: str
) -> None:
    fault = tell(wire, changed)
    assert isinstance(fault, Fault)
    assert (fault.code, fault.subject, fault.reason) == ("NotFinite", subject, "step 1")


@pytest.mark.parametrize("phase", [TRAIN, PREDICT])
@pytest.mark.parametrize(
    ("wire", "changed", "code"),
    [
        ("int8", {"r1@server#int8": fill((2, 5, 5, 5), 1, "i1")}, "ArrayMismatch"),
        ("int8", {"r1@server#int8": fill((2, 4, 5, 4), 1, "i1")}, "ArrayMismatch"),
        ("int8", {"r1@server#scale": fill((1, 5), 1)}, "ArrayMismatch"),
        ("int8", {"r1@server#int8": fill((2, 4, 5, 5), 1)}, "ArrayMismatch"),
        ("int4", {"r1@server#int4": fill((2, 63), 1, "u1")}, "ArrayMismatch"),
        ("int4", {"r1@server#scale": fill((3, 2), 1)}, "ArrayMismatch"),
        ("topk=0.1", {"r1@server#values": fill((2, 11), 1)}, "ArrayMismatch"),
        ("topk=0.1", {"r1@server#places": fill((3, 10), 1, "u2")}, "ArrayMismatch"),
        ("topk=0.1", {"r1@server#places": fill((2, 10), WIDTH, "u2")}, "ValueOutOfRange"),
        ("topk=0.1", {"r1@server#places": fill((2, 10), 65535, "u2")}, "ValueOutOfRange"),
    ],
)
def test_codes_of_a_wrong_size_and_places_beyond_the_end_are_refused(
    wire: str, changed: dict[str, np.ndarray], code: str, phase: str
) -> None:
    fault = tell(wire, changed, phase=phase)
    assert isinstance(fault, Fault)
    assert (fault.code, "'r1' (sent to the server)" in fault.reason) == (code, True)


def test_the_same_place_twice_is_a_place() -> None:
    changed = {"r1@server#places": fill((ROWS, 10), 7, "u2")}
    assert isinstance(tell("topk=0.1", changed), Tensors)


def test_codes_have_as_many_rows_as_the_labels() -> None:
    fault = tell("int8", {"r1@server#int8": fill((3, 4, 5, 5), 1, "i1")})
    assert isinstance(fault, Fault)
    assert fault.code == "ArrayMismatch"


@pytest.mark.parametrize(
    ("wire", "gradient"),
    [
        (
            "bwd=int8",
            {
                "act3@client_grad#int8": fill((2, 6), 2, "i1"),
                "act3@client_grad#scale": fill((1, 6), 1),
            },
        ),
        ("bwd=fp16", {"act3@client_grad#fp16": fill((2, 6), 2, "f2")}),
        ("bwd=bf16", {"act3@client_grad#bf16": fill((2, 6), 0x4000, "u2")}),
        (
            "bwd=topk=0.3",
            {
                "act3@client_grad#values": fill((2, 2), 5),
                "act3@client_grad#places": np.array([[0, 1], [2, 3]], "u2"),
            },
        ),
    ],
)
def test_a_gradient_whose_norm_is_too_large_when_decoded_is_refused(
    wire: str, gradient: dict[str, np.ndarray]
) -> None:
    plain = cut(ZOO["chain"].build(), at="act1", tail_at="act3")
    bundle = encode_crossings(plain, read_wire(wire))
    assert bundle.server is not None
    activation = {"act1@server": np.ones((2, 7), np.float32)}
    for limit, is_refused in [(6.5, True), (11.0, False)]:  # the norms are 6.9 and 10
        server = Executor(bundle.server, Engine(threads=1), norm=limit)
        caller = Caller(bundle, Registry(server), norm=limit)
        caller.say(make_task(), activation)
        (answer,) = caller.say(make_task(turn=1), gradient)
        assert isinstance(answer, Fault) is is_refused
        if isinstance(answer, Fault):
            assert (answer.code, "limit of 6.5" in answer.reason) == ("NormTooLarge", True)
        assert caller.step == (not is_refused)


def test_a_client_refuses_what_a_server_s_gradient_decodes_to() -> None:
    bundle = encode("int8")
    client, server = (Executor(p, Engine(threads=1)) for p in bundle.parties.values())
    key, data = make_task().key, ZOO["convolutions"].data(ROWS)
    client.begin(key, data=data, seed=0, learning_rate=1e-3)
    (sent,) = client.advance(key)
    server.begin(key, data={}, seed=0, learning_rate=1e-3)
    server.deliver(key, sent)
    reply = {name: array for group in server.advance(key) for name, array in group.items()}
    reply["r1@server_grad#scale"] = fill((1, 4), LARGEST)
    reply["r1@server_grad#int8"] = fill((ROWS, 4, 5, 5), 3, "i1")
    client.deliver(key, reply)
    with pytest.raises(NotFinite, match=r"the gradient of 'r1' holds NaN or infinity \(step 1\)"):
        list(client.advance(key))


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("wire", ["int8", "fwd=bf16,bwd=fp16", "randtopk=0.2"])
def test_a_real_server_trains_as_the_one_in_memory(wire: str, isolate: bool) -> None:
    bundle, data = encode(wire), ZOO["convolutions"].data(24)
    assert bundle.server is not None
    memory = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, memory, threads=1, seed=3) as client:
        wanted = [r.loss for r in client.fit(data, epochs=2, batch_size=8).steps]
    with (
        Server(bundle.server, port=0, threads=1, isolate=isolate) as server,
        Client(bundle.client, connect(server.url), threads=1, seed=3) as remote,
    ):
        found = [r.loss for r in remote.fit(data, epochs=2, batch_size=8).steps]
        assert set(remote.evaluate(data)) >= {"loss", "accuracy"}
    assert found == wanted


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize(
    ("scale", "limits", "reason"),
    [
        (LARGEST, Limits(), r"the gradient of 'act3' holds NaN or infinity \(step 1"),
        (1e6, Limits(norm=10.0), r"the gradient of 'act3' has the norm .*, over the limit of 10"),
    ],
)
def test_a_server_refuses_large_gradients_of_a_client_also_in_a_process_of_its_own(
    isolate: bool,
    scale: float,
    limits: Limits,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = cut(ZOO["chain"].build(), at="act1", tail_at="act3")
    bundle = encode_crossings(plain, read_wire("bwd=int8"))
    sending = Channel.send_wires

    def exaggerate(
        channel: Channel,
        key: TaskKey,
        wires: Mapping[str, np.ndarray],
        seed: int,
        learning_rate: float,
    ) -> None:
        changed = {n: np.full_like(a, scale) if "#scale" in n else a for n, a in wires.items()}
        sending(channel, key, changed, seed, learning_rate)

    monkeypatch.setattr(Channel, "send_wires", exaggerate)
    assert bundle.server is not None
    with (
        Server(bundle.server, port=0, threads=1, isolate=isolate, limits=limits) as server,
        Client(bundle.client, connect(server.url), threads=1) as client,
        pytest.raises(SplitonnxError, match=reason),
    ):
        client.step(ZOO["chain"].data(8))


def test_int8_sends_3_9_times_fewer_bytes_and_trains_the_digits_as_well() -> None:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    image = (images[order] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    arrays = {"image": image, "labels": labels[order].astype(np.int64)}
    train, held = ({n: a[r] for n, a in arrays.items()} for r in (slice(360, None), slice(360)))
    found = {}
    for wire in ("fp32", "int8"):
        bundle = splitonnx.cut(
            EXAMPLES / "digits.onnx",
            at="/block1/Relu_output_0",
            tail_at="/block3/MaxPool_1_output_0",
            optimizer=splitonnx.Adam(lr=1e-3),
            wire=wire,
            check=False,
        )
        assert bundle.server is not None
        memory = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
        with Client(bundle.client, memory, threads=1, seed=1) as client:
            history = client.fit(train, epochs=4, batch_size=32)
            steps = [r for r in history.steps if r.samples == 32]
            sent = sum(r.bytes_up + r.bytes_down for r in steps) / len(steps)
            found[wire] = sent, client.evaluate(held, batch_size=32)["accuracy"]
    assert found["fp32"][0] / found["int8"][0] > 3.85  # with headers
    assert abs(found["fp32"][1] - found["int8"][1]) <= 0.01
    assert found["int8"][1] > 0.96


def test_errors_of_encoded_tensors_name_those_of_the_model() -> None:
    assert "'h' (sent to the server)" in str(NotFinite("h@server#int8", "step 1"))
    assert "the gradient of 'h'" in str(NormTooLarge("h@server_grad#scale", 2.0, 1.0))


def test_a_long_sequence_of_scales_does_not_count_as_many_samples() -> None:
    net = Net()
    hidden = net.op("Tanh", net.op("MatMul", "x", net.weight("w", 2, 3), out="m"), out="h")
    scores = net.op("MatMul", hidden, net.weight("v", 3, 2), out="each")
    axes = net.constant("axes", np.array([1]))
    output = net.op("ReduceMean", scores, axes, out="scores", keepdims=0)
    model = net.finish({"x": (FLOAT, ["N", "T", 2])}, output, 2)
    bundle = encode_crossings(cut(model, at="h", loss="mse"), read_wire("int8"))
    random = np.random.default_rng(0)
    data = {
        "x": random.standard_normal((2, 5000, 2), np.float32),
        "labels": random.standard_normal((2, 2), np.float32),
    }
    assert bundle.server is not None
    with (
        Server(bundle.server, port=0, threads=1, limits=Limits(batch=4096)) as server,
        Client(bundle.client, connect(server.url), threads=1) as client,
    ):
        assert np.isfinite(client.step(data)["loss"])
