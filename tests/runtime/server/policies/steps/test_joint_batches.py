"""Batches of several clients are joined and divided so that numpy finds the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import pytest

from splitonnx.errors import UsageError
from splitonnx.manifests import PartyManifest, Wire, WireKind
from splitonnx.names import SERVER, TRAIN
from splitonnx.partitioner.cutting.transforms.crossings import encode_crossings
from splitonnx.runtime.server.policies.steps.joint_batches import BatchLayout
from splitonnx.tensors import TensorSpec
from splitonnx.wire_codecs import read_wire
from tests.support import tiny

MANIFEST = tiny.split_bundle().parties[SERVER].manifest
SIZES = (3, 1, 4)


def change_wires(*changed: Wire) -> PartyManifest:
    """Return the tiny server's manifest with some wires of the training step replaced or added."""
    new = {wire.tensor.name: wire for wire in changed}
    phases = []
    for phase in MANIFEST.phases:
        if phase.name == TRAIN:
            kept = [wire for wire in phase.wires if wire.tensor.name not in new]
            phase = msgspec.structs.replace(phase, wires=(*kept, *changed))
        phases.append(phase)
    return msgspec.structs.replace(MANIFEST, phases=tuple(phases))


def make_wire(
    name: str,
    shape: tuple[int | str, ...],
    kind: WireKind = WireKind.ACTIVATION,
    *,
    dtype: str = "F32",
    sender: str = "client",
) -> Wire:
    tensor = TensorSpec(name=name, dtype=dtype, shape=shape)
    receiver = "client" if sender == SERVER else SERVER
    return Wire(tensor=tensor, sender=sender, receiver=receiver, kind=kind)


@dataclass(frozen=True)
class Whole:
    """A step of mean squared error in float64, which computes what the tiny server does."""

    h: np.ndarray
    labels: np.ndarray

    @property
    def h_grad(self) -> np.ndarray:
        difference = self.h @ tiny.WEIGHTS["W2"].astype(np.float64) - self.labels
        return np.asarray(2 * difference / difference.size @ tiny.WEIGHTS["W2"].T)


def draw() -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [
        {
            "h": generator.standard_normal((size, 4)).astype(np.float32),
            "labels": generator.standard_normal((size, 2)).astype(np.float32),
        }
        for size in SIZES
    ]


def test_a_client_s_rows_are_those_of_its_tensors() -> None:
    layout = BatchLayout(MANIFEST)
    assert [layout.count_rows(part) for part in draw()] == list(SIZES)


def test_activations_and_labels_are_joined_in_the_order_of_the_clients() -> None:
    parts = draw()
    joined = BatchLayout(MANIFEST).join(parts, SIZES)
    for name in ("h", "labels"):
        np.testing.assert_array_equal(joined[name], np.concatenate([p[name] for p in parts]))


def test_the_gradient_of_each_client_is_that_of_its_own_mean() -> None:
    parts = draw()
    layout = BatchLayout(MANIFEST)
    whole = Whole(**layout.join(parts, SIZES))
    computed = {"h.grad": whole.h_grad.astype(np.float32), "loss": np.array(0.5, np.float32)}
    divided = layout.split(computed, SIZES)
    for part, found in zip(parts, divided, strict=True):
        alone = Whole(**part)
        np.testing.assert_allclose(found["h.grad"], alone.h_grad, rtol=1e-6, atol=1e-7)
        assert found["h.grad"].dtype == np.float32


def test_all_clients_are_told_the_loss_of_the_joint_batch() -> None:
    computed = {"h.grad": np.zeros((sum(SIZES), 4), np.float32), "loss": np.array(0.5, np.float32)}
    divided = BatchLayout(MANIFEST).split(computed, SIZES)
    assert [float(part["loss"]) for part in divided] == [0.5] * 3


def test_a_gradient_of_a_client_s_mean_becomes_one_of_the_joint_mean() -> None:
    manifest = change_wires(make_wire("y.grad", ("N", 2), WireKind.GRADIENT))
    parts = [{"y.grad": np.full((size, 2), float(n + 1), np.float32)} for n, size in
             enumerate(SIZES)]  # fmt: skip
    (joined,) = BatchLayout(manifest).join(parts, SIZES).values()
    expected = np.repeat([1 * 3 / 8, 2 * 1 / 8, 3 * 4 / 8], SIZES)
    np.testing.assert_array_equal(joined, np.stack([expected, expected], 1).astype(np.float32))


@pytest.mark.parametrize(("dtype", "kind"), [("F16", np.float16), ("F64", np.float64)])
def test_a_gradient_keeps_its_dtype_and_loses_no_more_than_that_rounds(
    dtype: str, kind: type[np.floating]
) -> None:
    manifest = change_wires(
        make_wire("h.grad", ("N", 4), WireKind.GRADIENT, dtype=dtype, sender=SERVER)
    )
    array = np.random.default_rng(1).standard_normal((3, 4)).astype(kind)
    first, second = BatchLayout(manifest).split({"h.grad": array}, (1, 2))
    assert first["h.grad"].dtype == kind
    np.testing.assert_allclose(
        first["h.grad"], array[:1].astype(np.float64) * 3, rtol=float(np.finfo(kind).eps)
    )
    exact = array[1:].astype(np.float64) * 1.5
    np.testing.assert_allclose(second["h.grad"], exact, rtol=float(np.finfo(kind).eps))


def test_one_client_alone_receives_every_bit_as_it_was() -> None:
    array = np.random.default_rng(2).standard_normal((5, 4)).astype(np.float32)
    (part,) = BatchLayout(MANIFEST).split({"h.grad": array}, (5,))
    assert part["h.grad"].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("wire", "shape"),
    [
        (make_wire("h", (8, 4)), r"\[8, 4\]"),
        (make_wire("h", ("N", "T", 4)), r"\[N, T, 4\]"),
        (make_wire("h", ("2*N", 4)), r"\[2\*N, 4\]"),
        (make_wire("h", (4, "N")), r"\[4, N\]"),
        (make_wire("h", ()), r"\[\]"),
        (make_wire("h.grad", (), WireKind.GRADIENT, sender=SERVER), r"\[\]"),
        (make_wire("loss", (1,), WireKind.REPORT, sender=SERVER), r"\[1\]"),
        (make_wire("count", (), WireKind.REPORT), r"\[\]"),
    ],
)
def test_a_tensor_without_rows_of_its_own_is_refused_with_its_shape(wire: Wire, shape: str) -> None:
    with pytest.raises(UsageError, match=rf"'{wire.tensor.name}' .*{shape} cannot be joined"):
        BatchLayout(change_wires(wire))


def test_rows_that_are_not_those_of_one_batch_are_refused() -> None:
    with pytest.raises(UsageError, match="name their rows differently: M, N"):
        BatchLayout(change_wires(make_wire("more", ("M", 4))))


def test_codes_of_whole_batches_are_not_joined() -> None:
    plain = tiny.split_bundle()
    for wire in ("int8", "bf16", "bwd=topk=0.25"):
        coded = encode_crossings(plain, read_wire(wire)).parties[SERVER].manifest
        with pytest.raises(UsageError, match="which cannot be joined; cut with --wire fp16"):
            BatchLayout(coded)
    layout = BatchLayout(encode_crossings(plain, read_wire("fp16")).parties[SERVER].manifest)
    parts = [{"h#fp16": np.full((n, 4), n, np.float16)} for n in SIZES]
    np.testing.assert_array_equal(
        layout.join(parts, SIZES)["h#fp16"][:, 0], np.repeat(SIZES, SIZES)
    )
