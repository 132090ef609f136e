"""Changed parts get checksums and a digest of their own, and leave the given bundle as it was."""

from __future__ import annotations

import hashlib

import msgspec

from splitonnx.bundles import compute_digest
from splitonnx.names import TRAIN
from splitonnx.partitioner.cutting.transforms.replacements import replace_parties, replace_phase
from tests.support import tiny


def test_a_replaced_phase_takes_the_place_of_the_one_of_its_name() -> None:
    client = tiny.split_bundle().client
    changed = msgspec.structs.replace(client.manifest.phase(TRAIN), results=())
    made = replace_phase(client, changed, {"new.onnx": b"graph"})
    assert made.manifest.phase(TRAIN) == changed
    assert [p.name for p in made.manifest.phases] == [p.name for p in client.manifest.phases]
    assert made.manifest.files["new.onnx"] == hashlib.sha256(b"graph").hexdigest()
    assert made.graphs == {**client.graphs, "new.onnx": b"graph"}
    assert "new.onnx" not in client.graphs


def test_all_parts_have_the_digest_of_what_they_are_now() -> None:
    bundle = tiny.split_bundle()
    changed = msgspec.structs.replace(bundle.client.manifest.phase(TRAIN), results=())
    parties = {**bundle.parties, "client": replace_phase(bundle.client, changed, {})}
    made = replace_parties(bundle, parties, bundle.manifest.recipe)
    digests = {made.manifest.digest, *(p.manifest.digest for p in made.parties.values())}
    assert len(digests) == 1
    again = replace_parties(made, made.parties, bundle.manifest.recipe)
    assert {again.manifest.digest} == digests
    plain = replace_parties(bundle, bundle.parties, bundle.manifest.recipe)
    assert {plain.manifest.digest} != digests
    assert compute_digest(bundle.parties)
