"""Tests of listing what a manifest lets a client send, and of saying so."""

from __future__ import annotations

import msgspec
import pytest

from splitonnx.disclosures import (
    count_run,
    describe_step,
    find_batch,
    list_labels,
    list_sent,
)
from splitonnx.manifests import FORMAT, Encoded, PartyManifest, Phase, Wire, WireKind
from splitonnx.names import CLIENT, EVALUATE, PORTABLE, PREDICT, SERVER, TRAIN
from splitonnx.tensors import TensorSpec


def spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def send(tensor: TensorSpec, kind: WireKind, sender: str = CLIENT) -> Wire:
    receiver = SERVER if sender == CLIENT else CLIENT
    return Wire(tensor=tensor, sender=sender, receiver=receiver, kind=kind)


def make_manifest(party: str = CLIENT, batch: int | str = "N") -> PartyManifest:
    """Make what a vanilla cut of a language model's beginning declares, with a mask beside it."""
    labels, mask = spec("labels", "I64", batch), spec("mask", "F32", batch, "T")
    hidden = send(spec("h@server", "F32", batch, 16), WireKind.ACTIVATION)
    sent = [hidden, send(spec("mask@server", "F32", batch, "T"), WireKind.INPUT)]
    arrays = (spec("ids", "I64", batch, "T"), mask)
    back = [
        send(spec("h@server_grad", "F32", batch, 16), WireKind.GRADIENT, SERVER),
        send(spec("loss", "F32"), WireKind.REPORT, SERVER),
    ]
    given = send(spec("labels@server", "I64", batch), WireKind.INPUT)
    is_client = party == CLIENT
    output = spec("scores", "F32", batch, 4)
    phases = [
        Phase(
            name=TRAIN,
            data=(*arrays, labels) if is_client else (),
            wires=(*sent, given, *back),
        ),
        Phase(name=PREDICT, data=arrays if is_client else (), wires=tuple(sent),
              results=("scores",) if is_client else ()),
    ]  # fmt: skip
    if is_client:
        phases.append(Phase(name=EVALUATE, data=(output, labels), results=("loss",)))
    return PartyManifest(
        format=FORMAT,
        party=party,
        digest="",
        target=PORTABLE,
        phases=tuple(phases),
        state=(),
        files={},
        learning_rate=0.1,
    )


def test_a_step_is_described_with_the_sizes_that_are_known() -> None:
    assert describe_step(list_sent(make_manifest(), TRAIN, batch=32)) == (
        "leaves the client per step of 32: activation 'h' F32[32, 16] (2,048 bytes), "
        "raw input 'mask' F32[32, T], labels I64[32] (256 bytes)"
    )
    assert describe_step(list_sent(make_manifest(), TRAIN)) == (
        "leaves the client per step: activation 'h' F32[N, 16] (64 bytes a sample), "
        "raw input 'mask' F32[N, T], labels I64[N] (8 bytes a sample)"
    )
    assert describe_step(list_sent(make_manifest(), PREDICT, batch=1)) == (
        "leaves the client per batch to predict of 1: activation 'h' F32[1, 16] (64 bytes), "
        "raw input 'mask' F32[1, T]"
    )
    assert describe_step(list_sent(make_manifest(), EVALUATE)).endswith(": nothing")


def test_a_tensor_that_tells_the_labels_is_marked() -> None:
    manifest = msgspec.structs.replace(make_manifest(), tells_labels=("h@server", "mask@server"))
    words = "the server can compute the labels from it"
    assert describe_step(list_sent(manifest, TRAIN)) == (
        f"leaves the client per step: activation 'h' F32[N, 16] (64 bytes a sample; {words}), "
        f"raw input 'mask' F32[N, T] ({words}), labels I64[N] (8 bytes a sample)"
    )


def test_bytes_of_an_element_type_that_nobody_knows_are_not_known() -> None:
    strange = send(spec("h@server", "F99", "N"), WireKind.ACTIVATION)
    train = Phase(name=TRAIN, wires=(strange,))
    manifest = msgspec.structs.replace(make_manifest(), phases=(train,))
    assert str(list_sent(manifest, TRAIN, batch=2)) == "activation 'h' F99[N]"


def test_what_comes_in_is_described_as_well() -> None:
    assert str(list_sent(make_manifest(), TRAIN, SERVER, 2)) == (
        "gradient of 'h' F32[2, 16] (128 bytes), result 'loss' F32[] (4 bytes)"
    )


@pytest.mark.parametrize("phase", [TRAIN, PREDICT])
def test_both_parties_manifests_give_the_same_list(phase: str) -> None:
    client, server = make_manifest(), make_manifest(SERVER)
    assert list_labels(client) == list_labels(server) == ("labels",)
    assert list_sent(client, phase, batch=8) == list_sent(server, phase, batch=8)


def test_the_bytes_of_a_run_are_those_of_all_its_steps() -> None:
    manifest = make_manifest()
    assert count_run(manifest, TRAIN, samples=20, batch=8, passes=2) == (6, None)  # T is not known
    wires = [w for w in manifest.phase(TRAIN).wires if not w.tensor.name.startswith("mask")]
    train = Phase(name=TRAIN, data=(spec("labels", "I64", "N"),), wires=tuple(wires))
    known = PartyManifest(
        format=FORMAT, party=CLIENT, digest="", target=PORTABLE, phases=(train,), state=(),
        files={}, learning_rate=0.1,
    )  # fmt: skip
    assert count_run(known, TRAIN, samples=20, batch=8, passes=2) == (6, 2 * 20 * (64 + 8))
    assert count_run(known, TRAIN, samples=16, batch=8, passes=3) == (6, 3 * 16 * (64 + 8))


def test_where_the_model_fixes_the_batch_no_smaller_one_is_counted() -> None:
    manifest = make_manifest(batch=8)
    assert (find_batch(manifest), find_batch(make_manifest())) == (8, None)
    assert count_run(manifest, TRAIN, samples=20, batch=8, passes=2)[0] == 4
    (hidden, *_) = list_sent(manifest, TRAIN).tensors
    assert hidden.bytes == 8 * 64


def test_a_batch_of_at_least_2_is_shown_and_counted_as_any_other() -> None:
    manifest = make_manifest(batch="N_less_1 + 1")
    hidden, *_, labels = list_sent(manifest, TRAIN).tensors
    assert str(hidden) == "activation 'h' F32[N, 16] (64 bytes a sample)"
    assert str(labels) == "labels I64[N] (8 bytes a sample)"
    hidden, *_ = list_sent(manifest, TRAIN, batch=8).tensors
    assert str(hidden) == "activation 'h' F32[8, 16] (512 bytes)"


def encode(manifest: PartyManifest) -> PartyManifest:
    """Have a manifest send the hidden activations of the first two phases as int8."""
    hidden = spec("h@server", "F32", "N", 16)
    carried = (
        send(spec("h@server#int8", "I8", "N", 16), WireKind.ACTIVATION),
        send(spec("h@server#scale", "F32", 1, 16), WireKind.ACTIVATION),
    )
    encoded = Encoded(
        tensor=hidden,
        sender=CLIENT,
        receiver=SERVER,
        kind=WireKind.ACTIVATION,
        codec="int8",
        wires=tuple(wire.tensor.name for wire in carried),
    )
    phases = [
        msgspec.structs.replace(
            phase,
            encoded=(encoded,),
            wires=(*carried, *(w for w in phase.wires if w.tensor.name != "h@server")),
        )
        if phase.wires
        else phase
        for phase in manifest.phases
    ]
    return msgspec.structs.replace(manifest, phases=tuple(phases))


@pytest.mark.parametrize("party", [CLIENT, SERVER])
def test_an_encoded_tensor_is_one_tensor_with_the_bytes_of_all_that_carries_it(party: str) -> None:
    manifest = encode(make_manifest(party))
    first = list_sent(manifest, TRAIN, batch=32).tensors[0]
    assert (first.wire, first.tensor, first.bytes) == ("h@server#int8", "h", 32 * 16 + 64)
    assert (first.bytes_per_sample, first.bytes_fixed) == (16, 64)
    assert str(first) == "activation 'h' F32[32, 16] as int8 (576 bytes)"
    unknown = list_sent(manifest, PREDICT).tensors[0]
    assert str(unknown) == "activation 'h' F32[N, 16] as int8 (16 bytes a sample and 64 more)"
    assert find_batch(manifest) is None
