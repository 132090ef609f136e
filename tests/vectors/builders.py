"""What the test vectors are: worked out from the Python side and its tests."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec
import numpy as np

from splitonnx.bundles import Bundle
from splitonnx.manifests import encode_manifest
from splitonnx.messages import Fault, Message, Tensors, Welcome, encode_message
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine, LoadedStage, Tensor
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.runtime.wire.protocols import list_wires
from splitonnx.schedules import (
    CosineSchedule,
    Epochs,
    LinearSchedule,
    OneCycleSchedule,
    Schedule,
    StepSchedule,
    plan_rates,
)
from splitonnx.sharing import ROUND
from splitonnx.tensors import DTYPES, name_dtype
from tests import test_codecs, test_messages
from tests.runtime.gate import test_gate_bytes, test_gates
from tests.support import spoiled_graphs, tiny
from tests.support.exchange_players import record_all
from tests.support.quantized_graphs import X, build_quantized, compute_quantized
from tests.support.zoo import ZOO
from tests.vectors.sample_axes import build_sample_axes
from tests.vectors.shapes import build_shapes

LONGEST = 4096
"""Bytes of one hostile case; larger ones are each suite's own."""
SESSION = "0123456789abcdef" * 2

Arrays = Mapping[str, np.ndarray]


def encode_bytes(content: bytes) -> str:
    return base64.b64encode(content).decode()


def describe_tensors(tensors: Arrays) -> dict[str, object]:
    return {
        name: {
            "dtype": name_dtype(array.dtype),
            "shape": list(array.shape),
            "bytes": encode_bytes(array.tobytes()),
        }
        for name, array in tensors.items()
    }


def build_messages() -> list[dict[str, object]]:
    """Every kind of message, every element type, shapes from none to empty to many."""
    random = np.random.default_rng(3)
    every = {
        f"{name} ü": random.integers(0, 2, (2, 3)).astype(dtype) for name, dtype in DTYPES.items()
    }
    shapes: Arrays = {
        "scalar": np.array(0.1, np.float32),
        "empty": np.zeros((0, 5), np.float64),
        "large": np.array([2**63 - 1, -(2**63)], np.int64),
        "__proto__": np.array([1], np.uint8),
        "ranks": np.zeros((1,) * 9, np.int16),
    }
    cases: list[tuple[Message, Arrays]] = [(message, {}) for message in test_messages.EVERY]
    cases += [(test_messages.TASK, every), (test_messages.TASK, shapes)]
    return [
        {
            "bytes": encode_bytes(b"".join(encode_message(message, tensors))),
            "message": msgspec.to_builtins(message),
            "tensors": describe_tensors(tensors),
        }
        for message, tensors in cases
    ]


def list_cases(test: Any) -> list[tuple[Any, str]]:
    """Give what a test is parametrized with."""
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    return list(mark.args[1])


def build_refusals() -> dict[str, list[dict[str, str]]]:
    """What the Python tests refuse, each with a part of the reason."""
    gates = test_gates
    graphs = [
        *list_cases(gates.test_a_graph_that_is_none_of_a_bundle_is_refused),
        *list_cases(test_gate_bytes.test_bytes_that_are_no_message_are_refused),
        *(
            (spoiled_graphs.hold(tensor), reason)
            for tensor, reason in list_cases(
                gates.test_a_tensor_that_is_not_what_it_claims_is_refused
            )
        ),
        *(
            (spoiled_graphs.spoil(partial(_change_input, change)), reason)
            for change, reason in list_cases(
                gates.test_a_declared_type_that_no_bundle_has_is_refused
            )
        ),
        *(
            (spoiled_graphs.hold(tensor), "outside")
            for tensor in (spoiled_graphs.EXTERNAL, test_gates.outside())
        ),
    ]
    return {
        "tensors": describe_cases(list_cases(test_codecs.test_bytes_that_lie_are_refused)),
        "messages": describe_cases(build_lies()),
        "manifests": build_manifests(),
        "graphs": describe_cases(graphs),
    }


def _change_input(change: Callable[[Any], object], model: Any) -> None:
    change(model.graph.input[0])


def describe_cases(cases: list[tuple[bytes, str]]) -> list[dict[str, str]]:
    return [
        {"bytes": encode_bytes(content), "reason": reason}
        for content, reason in cases
        if len(content) <= LONGEST
    ]


def build_lies() -> list[tuple[bytes, str]]:
    """Well-formed tensors whose fields are no message's."""
    good = msgspec.to_builtins(test_messages.TASK)
    greeting: dict[str, object] = {
        "type": "Welcome", "session": "s", "digest": "d", "step": 0, "wires": {}
    }  # fmt: skip
    fields: list[dict[str, object]] = [
        {},
        {"type": "Nonsense"},
        {"type": "toString"},
        {**good, "type": 3},
        {name: value for name, value in good.items() if name != "turn"},
        {**good, "step": -1},
        {**good, "step": 2**63},
        {**good, "step": 1.5},
        {**good, "step": "3"},
        {**good, "step": None},
        {**good, "session": 3},
        {**good, "learning_rate": "0.1"},
        {"type": "Welcome", "session": "s", "digest": "d", "step": 0, "wires": {"train": [{}]}},
        {"type": "Welcome", "session": "s", "digest": "d", "step": 0, "wires": []},
        {**greeting, "local_steps": -1},
        {**greeting, "local_steps": None},
        {**greeting, "rounds": 0.5},
        {**greeting, "policy": 1},
        {"type": "Fault", "code": "x"},
    ]
    texts = [json.dumps(one) for one in fields] + ["", "[]", "{", '{"type":"Bye","type":"Bye"}']
    lies = [test_codecs.join({}, {"splitonnx": text}) for text in texts]
    lies.append(test_codecs.join({}, {"other": "{}"}))
    lies.append(test_codecs.join({}, {"splitonnx": '{"type":"Bye"}', "more": ""}))
    lies.append(test_codecs.join({"x": np.zeros(1, np.float32)}, {"splitonnx": '{"type":"Bye"}'}))
    return [(lie, "") for lie in lies if b'"type":"Bye","type"' not in lie.replace(b"\\", b"")]


def build_manifests() -> list[dict[str, str]]:
    """What makes a manifest none, as changes to that of ``tiny``."""
    text = encode_manifest(tiny.sharing_bundle().client.manifest).decode()
    changes = [
        ('"splitonnx.bundle/1"', '"splitonnx.bundle/9"'),
        ('"party": "client"', '"party": 3'),
        ('"source": "data"', '"source": "nowhere"'),
        ('"role": "parameter"', '"role": "other"'),
        ('"kind": "activation"', '"kind": 1'),
        ('"phases"', '"phrases"'),
        ('"learning_rate": 0.1', '"learning_rate": "fast"'),
        ('"files": {', '"files": ['),
    ]
    assert all(before in text for before, _ in changes)
    return [{"before": before, "after": after} for before, after in changes]


def build_replies() -> list[dict[str, object]]:
    """What a hostile server says to a client of ``tiny`` that stands at step 0."""
    manifest = tiny.sharing_bundle().client.manifest
    wires = list_wires(manifest)
    change = msgspec.structs.replace
    welcome = Welcome(session=SESSION, digest=manifest.digest, step=0, wires=wires)
    fewer = change(welcome, wires={"train": wires["train"]})
    task = Tensors(
        session=SESSION, phase="train", step=0, micro_batch=0, turn=0, seed=0, learning_rate=0.1
    )
    gradient = np.ones((6, 4), np.float32)
    share, weight = change(task, phase="share"), tiny.WEIGHTS["W1"]
    joined: Arrays = {ROUND: np.array(1), "W1@joined": weight}
    cases: list[tuple[str, Message, Arrays, str]] = [
        ("greeting", change(welcome, digest="00"), {}, "BundleMismatch"),
        ("greeting", fewer, {}, "BundleMismatch"),
        ("greeting", task, {}, "RemoteProtocolError"),
        ("open", fewer, {}, "RemoteProtocolError"),
        ("open", task, {"h": gradient}, "RemoteProtocolError"),
        ("open", task, {"other": gradient}, "RemoteProtocolError"),
        ("open", change(task, phase="none"), {"h.grad": gradient}, "RemoteProtocolError"),
        ("open", task, {"h.grad": np.ones((6, 5), np.float32)}, "ArrayMismatch"),
        ("open", task, {"h.grad": np.ones((6, 4, 1), np.float32)}, "ArrayMismatch"),
        ("open", task, {"h.grad": gradient.astype(np.float64)}, "ArrayMismatch"),
        ("open", task, {"loss": np.ones(1, np.float32)}, "ArrayMismatch"),
        ("open", task, {"h.grad": gradient * np.float32(np.nan)}, "NotFinite"),
        ("open", task, {"h.grad": gradient * np.float32(np.inf)}, "NotFinite"),
        ("open", task, {"loss": np.array(np.nan, np.float32)}, "NotFinite"),
        ("open", share, joined, ""),
        ("open", share, {ROUND: joined[ROUND]}, "RemoteProtocolError"),
        ("open", share, {"W1@joined": joined["W1@joined"]}, "RemoteProtocolError"),
        ("open", share, {**joined, "W2@joined": weight}, "RemoteProtocolError"),
        ("open", share, {**joined, "W1@joined": weight.T}, "ArrayMismatch"),
        ("open", share, {**joined, ROUND: np.array([1])}, "ArrayMismatch"),
        ("open", share, {**joined, "W1@joined": weight * np.float32(np.nan)}, "NotFinite"),
        ("start", fewer, {}, "RemoteProtocolError"),
        ("open", Fault(code="x", reason="y"), {}, ""),
        ("greeting", welcome, {}, ""),
        ("open", task, {"h.grad": gradient, "loss": np.array(1, np.float32)}, ""),
    ]
    return [
        {
            "state": state,
            "bytes": encode_bytes(b"".join(encode_message(message, tensors))),
            "error": error,
        }
        for state, message, tensors, error in cases
    ]


def build_quantized_stage() -> dict[str, object]:
    """A quantized graph that ONNX Runtime computes wrongly with its usual settings."""
    return {
        "graph": encode_bytes(build_quantized()),
        "inputs": describe_tensors({"x": X}),
        "outputs": describe_tensors(compute_quantized(X)),
    }


def build_schedules() -> list[dict[str, object]]:
    """Schedules as TypeScript spells them, and their factors in 2 epochs of 5 steps."""
    half: dict[str, object] = {"epochs": 0.5}
    cases: list[tuple[dict[str, object], Schedule]] = [
        ({"kind": "constant", "warmup": half}, Schedule(warmup=Epochs(0.5))),
        ({"kind": "cosine"}, CosineSchedule()),
        (
            {"kind": "cosine", "warmup": 4, "warmupFactor": 0.25, "endFactor": 0.1},
            CosineSchedule(warmup=4, warmup_factor=0.25, end_factor=0.1),
        ),
        ({"kind": "linear", "endFactor": 0.1}, LinearSchedule(end_factor=0.1)),
        ({"kind": "step", "stepSize": 4}, StepSchedule(step_size=4)),
        (
            {"kind": "step", "stepSize": half, "gamma": 0.5, "warmup": 1},
            StepSchedule(step_size=Epochs(0.5), gamma=0.5, warmup=1),
        ),
        ({"kind": "one-cycle"}, OneCycleSchedule()),
        (
            {"kind": "one-cycle", "pctStart": 0, "divFactor": 10, "finalDivFactor": 100},
            OneCycleSchedule(pct_start=0, div_factor=10, final_div_factor=100),
        ),
        ({"kind": "one-cycle", "pctStart": 1}, OneCycleSchedule(pct_start=1)),
    ]
    plans = [(spelled, plan_rates(one, epochs=2, steps_per_epoch=5)) for spelled, one in cases]
    return [
        {
            "schedule": spelled,
            "factors": [
                round(plan.get_factor(epoch, step), 12) for epoch in range(2) for step in range(5)
            ],
        }
        for spelled, plan in plans
    ]


def build_shuffles() -> list[dict[str, object]]:
    """Orders of rows; of many rows a few, and the sum of each row times its place."""
    cases = [(0, 0, 1), (0, 0, 2), (0, 0, 7), (5, 0, 100), (5, 1, 100), (2**40 + 3, 9, 33)]
    cases += [(2**53 - 1, 70_000, 12), (1, 2**33, 12), (7, 0, 1000), (7, 3, 70_000)]
    shuffles: list[dict[str, object]] = []
    for seed, epoch, size in cases:
        order = np.arange(size)
        np.random.default_rng([seed, epoch]).shuffle(order)
        shuffles.append(
            {
                "seed": seed,
                "epoch": epoch,
                "size": size,
                "first": order[:100].tolist(),
                "sum": int(np.sum(order * np.arange(size))),
            }
        )
    return shuffles


def build_bundle() -> Bundle:
    """A model with BatchNormalization and Dropout, U-shaped and portable."""
    entry = ZOO["dropout"]
    return cut(
        entry.build(),
        at="r1",
        tail_at="flat",
        loss=entry.loss,
        client_target="portable",
        server_target="portable",
    )


class Recorder(Engine):
    """An engine that keeps what goes into and comes out of each stage, first run by first run."""

    def __init__(self, party: str, kept: dict[str, np.ndarray]) -> None:
        super().__init__(threads=1)
        self._party = party
        self._kept = kept

    def run(self, stage: LoadedStage, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = super().run(stage, feeds)
        for way, tensors in (("in", feeds), ("out", outputs)):
            for name, tensor in tensors.items():
                place = f"{self._party}/{stage.name}/{way}/{name}"
                self._kept.setdefault(place, self.to_array(tensor).copy())
        return outputs


def record_stages(bundle: Bundle) -> dict[str, np.ndarray]:
    """Train a step, predict, evaluate, accumulate; give every stage's inputs and outputs.

    They are named ``party/stage/in/name`` and ``party/stage/out/name``.
    """
    assert bundle.server is not None
    data = ZOO["dropout"].data(3)
    kept: dict[str, np.ndarray] = {}
    link = connect_in_memory(Executor(bundle.server, Recorder("server", kept)))
    with Client(bundle.client, link, seed=11, threads=1) as client:
        client._executor._engine = Recorder("client", kept)  # it makes its own otherwise
        client.step(data)
        client.evaluate(data)
        client.step(data, accumulate=2)
        link.drain()
    return kept


BUILDERS: Mapping[str, Callable[[], object]] = {
    "exchanges": record_all,
    "messages": build_messages,
    "quantized_stage": build_quantized_stage,
    "refusals": build_refusals,
    "replies": build_replies,
    "schedules": build_schedules,
    "sample_axes": build_sample_axes,
    "shapes": build_shapes,
    "shuffles": build_shuffles,
}
"""What each file of JSON is built by."""
