"""The test vectors that runtimes of every language run: fresh, and true of this one."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from splitonnx import operators
from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.codecs import decode_tensors
from splitonnx.errors import ForbiddenGraph, FormatError, SplitonnxError
from splitonnx.manifests import PartyManifest, decode_manifest
from splitonnx.messages import Hello, decode_message
from splitonnx.names import CLIENT
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.gate.gates import check_graph
from splitonnx.runtime.wire.protocols import Protocol, State, list_wires
from tests.conftest import ROOT
from tests.support import tiny
from tests.vectors import builders

HERE = Path(builders.__file__).parent
LARGEST = 430_000
"""Bytes of all vectors together; a bundle's manifests list what it shares once for each party."""


def read(name: str) -> Any:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", builders.BUILDERS)
def test_the_vectors_are_fresh(name: str) -> None:
    built = builders.BUILDERS[name]()
    assert json.loads(json.dumps(built)) == read(name), "run: python -m tests.vectors"


def test_the_tiny_client_is_fresh() -> None:
    kept, fresh = PartyBundle.load(HERE / "tiny"), tiny.sharing_bundle().client
    written = msgspec.structs.replace(fresh.manifest, weights=kept.manifest.weights)
    assert kept.manifest == written, "run: python -m tests.vectors"


def test_the_bundle_with_dropout_is_fresh() -> None:
    kept, fresh = Bundle.load(HERE / "dropout"), builders.build_bundle()
    assert kept.skeleton == fresh.skeleton, "run: python -m tests.vectors"
    for name, party in fresh.parties.items():
        old = kept.parties[name]
        written = msgspec.structs.replace(party.manifest, weights=old.manifest.weights)
        assert old.manifest == written, "run: python -m tests.vectors"
        assert old.graphs == party.graphs, "run: python -m tests.vectors"


def test_the_gate_in_javascript_knows_the_same_operators() -> None:
    text = (ROOT / "runtime" / "js" / "src" / "operators.ts").read_text()
    for name in ("STANDARD_OPERATORS", "TRAINING_OPERATORS"):
        listed = text.split(f"export const {name}")[1].split("`")[1].split()
        assert set(listed) == getattr(operators, name)
    for name in ("HIGHEST_OPSET", "HIGHEST_TRAINING_OPSET", "HIGHEST_IR_VERSION"):
        assert f"export const {name} = {getattr(operators, name)};" in text


def test_the_vectors_are_small() -> None:
    files = [path for path in HERE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < LARGEST


def test_messages_mean_what_is_written_beside_them() -> None:
    for case in read("messages"):
        message, tensors = decode_message(base64.b64decode(case["bytes"]))
        assert json.loads(msgspec.json.encode(message)) == case["message"]
        assert builders.describe_tensors(tensors) == case["tensors"]


def test_what_must_be_refused_is_refused() -> None:
    cases = read("refusals")
    for case in cases["tensors"]:
        with pytest.raises(FormatError, match=case["reason"]):
            decode_tensors(base64.b64decode(case["bytes"]), max_header=1 << 20)
    for case in cases["messages"]:
        with pytest.raises(FormatError):
            decode_message(base64.b64decode(case["bytes"]))
    manifest = (HERE / "tiny" / "manifest.json").read_text()
    for case in cases["manifests"]:
        changed = manifest.replace(case["before"], case["after"], 1).encode()
        with pytest.raises(FormatError):
            decode_manifest(changed, PartyManifest, "manifest.json")
    for case in cases["graphs"]:
        with pytest.raises(ForbiddenGraph, match=case["reason"]):
            check_graph("stage", base64.b64decode(case["bytes"]))


def test_a_client_takes_and_refuses_replies_as_the_vectors_say() -> None:
    manifest = tiny.sharing_bundle().client.manifest
    hello = Hello(
        digest=manifest.digest, session=builders.SESSION, step=0, wires=list_wires(manifest)
    )
    for case in read("replies"):
        protocol = Protocol(manifest, CLIENT)
        if case["state"] != "start":
            protocol.send(hello)
        protocol.state = State(case["state"])
        error = ""
        try:
            protocol.receive(base64.b64decode(case["bytes"]))
        except SplitonnxError as caught:
            error = type(caught).__name__
        assert error == case["error"], case


def test_every_stage_gives_what_the_vectors_say() -> None:
    bundle = Bundle.load(HERE / "dropout")
    content = (HERE / "stages.safetensors").read_bytes()
    kept, _ = decode_tensors(content, max_header=1 << 20)
    engine = Engine(threads=1)
    ran = 0
    for party, part in bundle.parties.items():
        for phase in part.manifest.phases:
            for stage in phase.stages:
                loaded = engine.load(stage.name, part.graphs[stage.graph], training=False)
                place = f"{party}/{stage.name}"
                feeds = {i.name: kept[f"{place}/in/{i.name}"] for i in stage.inputs}
                outputs = engine.run(loaded, {n: engine.from_array(a) for n, a in feeds.items()})
                for name, tensor in outputs.items():
                    expected = kept[f"{place}/out/{name}"]
                    found = engine.to_array(tensor)
                    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
                ran += 1
    assert ran == 24
