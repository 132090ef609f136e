"""Manifests: written and read back, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from splitonnx.bundles import PartyBundle, _read_manifest
from splitonnx.errors import BundleError, FormatError
from splitonnx.manifests import (
    FORMAT,
    MAX_SLOTS,
    BundleManifest,
    Encoded,
    PartyManifest,
    Role,
    WireKind,
    decode_manifest,
    encode_manifest,
    has_valid_checksum,
)
from splitonnx.tensors import TensorSpec
from tests.support import tiny
from tests.support.bit_flips import flips


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny.split_bundle().save(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("place", [".", "client", "server"])
def test_every_altered_bit_of_a_manifest_is_noticed_or_changes_nothing(
    saved: Path, place: str
) -> None:
    path = saved / place / "manifest.json"

    def read() -> object:
        if place == ".":
            return _read_manifest(path.parent, BundleManifest)
        return _read_manifest(path.parent, PartyManifest)

    whole, unnoticed = read(), 0
    for _ in flips(path):
        try:
            found = read()
        except (BundleError, FormatError):
            continue
        unnoticed += 1
        assert found == whole  # the flip is in the sum's own key
    assert unnoticed <= len('"sha256": "')


def test_a_manifest_of_an_earlier_version_has_no_sum(saved: Path) -> None:
    path = saved / "client" / "manifest.json"
    fields = msgspec.json.decode(path.read_bytes())
    assert len(fields.pop("sha256")) == 64
    path.write_bytes(msgspec.json.format(msgspec.json.encode(fields), indent=2))
    PartyBundle.load(saved / "client")


BUNDLE = tiny.split_bundle()
CLIENT = BUNDLE.client.manifest


def change_state(**changes: Any) -> bytes:
    first, *rest = CLIENT.state
    spec = msgspec.structs.replace(first.tensor, **changes)
    state = (msgspec.structs.replace(first, tensor=spec), *rest)
    return encode_manifest(msgspec.structs.replace(CLIENT, state=state))


@pytest.mark.parametrize("kind", [PartyManifest, BundleManifest])
def test_a_manifest_is_read_as_it_was_written(kind: type) -> None:
    manifest = CLIENT if kind is PartyManifest else BUNDLE.manifest
    content = encode_manifest(manifest)
    read = decode_manifest(content, kind, "here")
    assert msgspec.structs.replace(read, sha256="") == manifest
    assert encode_manifest(read) == content
    assert has_valid_checksum(content)


def test_a_manifest_is_text_that_shows_its_changes_line_by_line() -> None:
    lines = encode_manifest(CLIENT).decode().splitlines()
    assert len(lines) > 50
    assert lines[1].strip().startswith('"format"')
    assert lines[-2].strip().startswith('"sha256"')


def test_a_phase_that_is_absent_has_nothing_to_do() -> None:
    assert CLIENT.phase("train").name == "train"
    nothing = CLIENT.phase("dream")
    assert (nothing.name, nothing.stages, nothing.wires) == ("dream", (), ())


def spoil(old: str, new: str) -> bytes:
    content = encode_manifest(CLIENT).decode()
    assert old in content
    return content.replace(old, new, 1).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        encode_manifest(CLIENT)[:-10],
        spoil(FORMAT, "splitonnx.bundle/99"),
        spoil('"learning_rate"', '"speed"'),
        spoil('"source": "data"', '"source": "ether"'),
        change_state(shape=(3, None)),
        change_state(shape=("N", 4)),
        change_state(shape=(-1, 4)),
        change_state(dtype="F8"),
        change_state(name="W1.m"),
    ],
)
def test_what_is_no_manifest_is_refused_by_where_it_came_from(content: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        decode_manifest(content, PartyManifest, "the place")
    assert caught.value.subject == "the place"


def test_a_party_s_manifest_is_no_bundle_s() -> None:
    with pytest.raises(FormatError):
        decode_manifest(encode_manifest(CLIENT), BundleManifest, "here")


def test_an_optimizer_s_tensors_are_few_to_a_parameter() -> None:
    """Memory is taken for them on the manifest's word alone."""
    (slot,) = [spec for spec in CLIENT.state if spec.role is Role.OPTIMIZER]
    for count, is_taken in ((MAX_SLOTS, True), (MAX_SLOTS + 1, False)):
        slots = tuple(
            msgspec.structs.replace(
                slot, tensor=msgspec.structs.replace(slot.tensor, name=f"m{number}")
            )
            for number in range(count)
        )
        parameters = tuple(spec for spec in CLIENT.state if spec.role is Role.PARAMETER)
        content = encode_manifest(msgspec.structs.replace(CLIENT, state=parameters + slots))
        if is_taken:
            decode_manifest(content, PartyManifest, "here")
        else:
            with pytest.raises(FormatError):
                decode_manifest(content, PartyManifest, "here")


def test_a_wire_whose_dimension_nothing_binds_is_refused() -> None:
    phase = CLIENT.phase("train")
    wire = phase.wires[0]
    free = msgspec.structs.replace(wire.tensor, shape=(None, 4))
    wires = (msgspec.structs.replace(wire, tensor=free), *phase.wires[1:])
    phases = (msgspec.structs.replace(phase, wires=wires),)
    with pytest.raises(FormatError, match="'h' of phase 'train'"):
        decode_manifest(
            encode_manifest(msgspec.structs.replace(CLIENT, phases=phases)), PartyManifest, "here"
        )


def test_only_a_phase_with_a_codec_says_what_is_encoded() -> None:
    plain = tiny.split_bundle().client.manifest
    assert b"encoded" not in encode_manifest(plain)
    assert plain.phases[0].list_encoded() == ()
    tensor = TensorSpec(name="h", dtype="F32", shape=("N", 4))
    encoded = Encoded(
        tensor=tensor,
        sender="client",
        receiver="server",
        kind=WireKind.ACTIVATION,
        codec="int8",
        wires=("h#int8", "h#scale"),
    )
    phase = msgspec.structs.replace(plain.phases[0], encoded=(encoded,))
    coded = msgspec.structs.replace(plain, phases=(phase, *plain.phases[1:]))
    content = encode_manifest(coded)
    found = decode_manifest(content, PartyManifest, "m")
    assert found.phases[0].list_encoded() == (encoded,)
    assert encode_manifest(found) == content
