"""What crosses a cut is encoded: declarations, arithmetic against numpy, and refusals."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import UsageError
from splitonnx.manifests import KEY, Phase, Source, WireKind
from splitonnx.messages import TaskKey
from splitonnx.names import PREDICT, TRAIN
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.cutting.transforms.crossings import encode_crossings
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut, cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.wire_codecs import read_wire
from tests.support import tiny
from tests.support.links import link, make_bundle
from tests.support.zoo import ZOO

ENGINE = Engine(threads=1)
Rounding = Callable[[np.ndarray], np.ndarray]


def encode(bundle: Bundle, wire: str) -> Bundle:
    return encode_crossings(bundle, read_wire(wire))


def get_phase(bundle: Bundle, name: str = TRAIN) -> Phase:
    return bundle.client.manifest.phase(name)


def round_int8(x: np.ndarray) -> np.ndarray:
    scale = np.maximum(np.abs(x).max(0) / 127, 2.0**-126)
    return np.asarray(np.rint(x / scale) * scale)


def round_fp16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float64)


def round_bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def keep_largest(x: np.ndarray) -> np.ndarray:
    """Keep one of the four numbers of each sample."""
    is_kept = np.arange(4) == np.abs(x).argmax(1, keepdims=True)
    return np.where(is_kept, x, 0)


def step(
    state: dict[str, np.ndarray],
    data: dict[str, np.ndarray],
    forward: Rounding,
    backward: Rounding,
) -> float:
    """Take the tiny model's step in place with what crosses rounded, unsplit and in float64.

    The gradient is that at the rounded activations, and passes straight through the rounding.
    """
    a = data["x"] @ state["W1"]
    h = forward(np.maximum(a, 0))
    difference = h @ state["W2"] - data["labels"]
    y_grad = 2 * difference / difference.size
    grads = {
        "W1": data["x"].T @ (backward(y_grad @ state["W2"].T) * (a > 0)),
        "W2": h.T @ y_grad,
    }
    for name, grad in grads.items():
        state[f"{name}.m"] = 0.9 * state.get(f"{name}.m", 0) + grad
        state[name] = state[name] - tiny.RATE * state[f"{name}.m"]
    return float(np.mean(difference**2))


@pytest.mark.parametrize(
    ("wire", "forward", "backward"),
    [
        ("fp16", round_fp16, round_fp16),
        ("bf16", round_bf16, round_bf16),
        ("int8", round_int8, round_int8),
        ("fwd=int8,bwd=bf16", round_int8, round_bf16),
        ("fwd=bf16", round_bf16, np.asarray),
        ("bwd=int8", np.asarray, round_int8),
        ("topk=0.25", keep_largest, keep_largest),
        ("fwd=fp16,bwd=topk=0.25", round_fp16, keep_largest),
    ],
)
def test_a_step_with_a_codec_is_the_step_that_numpy_takes_with_rounded_crossings(
    wire: str, forward: Rounding, backward: Rounding
) -> None:
    client, server = link(encode(tiny.split_bundle(), wire))
    reference = tiny.reference_state()
    for number in range(4):
        data = tiny.batch(number)
        loss = float(client.step(data, learning_rate=tiny.RATE)["loss"])
        assert loss == pytest.approx(step(reference, data, forward, backward), rel=1e-4)
        found = client.state()
        np.testing.assert_allclose(found["W1"], reference["W1"], rtol=1e-3, atol=1e-5)
    assert server is not None


def test_predictions_use_the_forward_codec() -> None:
    client, _ = link(encode(tiny.split_bundle(), "fwd=int8,bwd=topk=0.5"))
    x, state = tiny.batch(1)["x"], tiny.reference_state()
    hidden = round_int8(np.maximum(x @ state["W1"], 0))
    np.testing.assert_allclose(client.predict({"x": x})["y"], hidden @ state["W2"], rtol=1e-5)


def test_without_a_codec_nothing_changes() -> None:
    bundle = make_bundle()
    assert encode(bundle, "fp32") is bundle
    assert encode(bundle, "fwd=fp32") is bundle
    assert encode_crossings(bundle, read_wire(None)) is bundle
    for party in bundle.parties.values():
        assert b"encoded" not in party.encode()[0]


def test_the_manifest_declares_what_really_travels() -> None:
    bundle = encode(make_bundle("convolutions", "r1"), "fwd=int8,bwd=bf16")
    assert bundle.manifest.recipe.wire == "fwd=int8,bwd=bf16"
    found = {w.tensor.name: (str(w.tensor), w.kind) for w in get_phase(bundle).wires}
    assert found == {
        "r1@server#int8": ("I8[N, 4, 5, 5]", WireKind.ACTIVATION),
        "r1@server#scale": ("F32[1, 4]", WireKind.ACTIVATION),
        "labels@server": ("I64[N]", WireKind.INPUT),
        "r1@server_grad#bf16": ("U16[N, 4, 5, 5]", WireKind.GRADIENT),
        "loss": ("F32[]", WireKind.REPORT),
        "accuracy": ("F32[]", WireKind.REPORT),
    }
    encoded = {e.tensor.name: (e.codec, e.wires) for e in get_phase(bundle).list_encoded()}
    assert encoded == {
        "r1@server": ("int8", ("r1@server#int8", "r1@server#scale")),
        "r1@server_grad": ("bf16", ("r1@server_grad#bf16",)),
    }
    assert bundle.server is not None
    for party in (bundle.client, bundle.server):
        assert party.manifest.phase(TRAIN).wires == get_phase(bundle).wires
        assert party.manifest.phase(TRAIN).encoded == get_phase(bundle).encoded
        assert party.manifest.digest == bundle.manifest.digest
    outputs = [w.tensor.name for w in get_phase(bundle, PREDICT).wires if w.kind == "output"]
    assert outputs == ["scores"]


def test_only_the_stages_that_send_change_and_only_one_is_added_to_decode() -> None:
    plain = make_bundle("convolutions", "r1")
    bundle = encode(plain, "int8")
    assert plain.server is not None
    assert bundle.server is not None
    changed = {
        name
        for before, after in [(plain.client, bundle.client), (plain.server, bundle.server)]
        for name, graph in after.graphs.items()
        if before.graphs.get(name) != graph
    }
    assert changed == {
        "head.forward.onnx",
        "head.predict.onnx",
        "body.step.onnx",
        "head.backward.decode.onnx",
        "body.step.decode.onnx",
        "body.predict.decode.onnx",
    }
    stage = next(s for s in get_phase(bundle).stages if s.name == "head.backward")
    sources = {i.name: i.source for i in stage.inputs}
    assert sources["r1@server_grad"] is Source.STASH


def test_the_merged_model_has_no_codec() -> None:
    plain = make_bundle()
    assert merge(encode(plain, "int8")) == merge(plain)


def test_only_randtopk_in_training_reads_the_key() -> None:
    bundle = encode(make_bundle(), "fwd=randtopk=0.3")
    read = {
        stage.name: any(i.name == KEY and i.source is Source.SCALAR for i in stage.inputs)
        for phase in bundle.client.manifest.phases
        for stage in phase.stages
    }
    assert read["head.forward"]
    assert not read["head.predict"]
    assert not any(value for name, value in read.items() if name != "head.forward")


def test_a_step_with_randtopk_can_be_repeated_exactly() -> None:
    data = ZOO["chain"].data(12)
    losses = []
    for _ in range(2):
        client, _ = link(encode(make_bundle(), "randtopk=0.3"))
        losses.append([float(client.step(data)["loss"]) for _ in range(4)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4


@pytest.mark.parametrize("name", ["two_streams", "attention", "embedding", "dropout", "pools"])
@pytest.mark.parametrize("wire", ["int8", "fwd=bf16,bwd=fp16"])
def test_every_kind_of_cut_trains_close_to_the_model_without_a_codec(name: str, wire: str) -> None:
    entry = ZOO[name]
    prepared = prepare(open_model(entry.build()))
    places = entry.several or (list_cuts(prepared, None)[0].tensor,)
    plain = cut_prepared(prepared, at=places, loss=entry.loss)
    data = entry.data(16)
    found = []
    for bundle in (plain, encode(plain, wire)):
        client, _ = link(bundle)
        found.append([float(client.step(data)["loss"]) for _ in range(3)])
    np.testing.assert_allclose(found[1], found[0], rtol=0.02)
    assert found[1] != found[0]


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        ("int4", "'act1', which is F32[N, 7]: a sample has 7 elements, and it needs 16"),
        ("topk=0.9", "7 of 7 elements of a sample with their places take no less than all of them"),
    ],
)
def test_what_cannot_be_encoded_is_refused_with_the_tensor_and_the_reason(
    wire: str, reason: str
) -> None:
    with pytest.raises(UsageError) as caught:
        encode(make_bundle(), wire)
    assert reason in str(caught.value)
    assert "cannot encode 'act1'" in str(caught.value) or "the gradient of" in str(caught.value)


def test_where_no_float_crosses_a_codec_is_refused() -> None:
    whole = cut(ZOO["chain"].build(), at=None)
    with pytest.raises(UsageError, match="sends no floats that it would encode"):
        encode(whole, "int8")


def test_what_a_stage_still_needs_is_kept_though_it_is_sent_encoded() -> None:
    plain = make_bundle("convolutions", "r1")
    bundle = encode(plain, "int8")
    before, after = (get_phase(b).stages[0] for b in (plain, bundle))
    read = {i.name for stage in get_phase(plain).stages for i in stage.inputs}
    kept = [name for name in before.outputs if name in read]
    assert set(kept) <= set(after.outputs)
    task = TaskKey("s", TRAIN, 0, 0)
    executor = Executor(bundle.client, ENGINE)
    executor.begin(task, data=ZOO["convolutions"].data(4), seed=0, learning_rate=0.1)
    (sent,) = executor.advance(task)  # one message, as without a codec
    assert set(sent) == {"r1@server#int8", "r1@server#scale", "labels@server"}
