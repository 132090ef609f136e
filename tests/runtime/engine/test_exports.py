"""Exports for mobile apps: ORT format trains as ONNX does, needs what it lists, comes whole."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnxruntime.tools.reduced_build_config_parser import parse_config

import splitonnx
from splitonnx import atomic, bundles
from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import BundleError, ForbiddenGraph, NotExportable, StageFailed
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine import engines, exports
from splitonnx.runtime.engine.builds.installed import InstalledRuntime, installed_runtime
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.engine.exports import OPERATORS, OPERATORS_AND_TYPES, export
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.runtime.server.servers import Server
from tests.support import portable_training, tiny
from tests.support.commands import AT, MODEL, TAIL_AT, Command
from tests.support.zoo import ZOO

RTOL = 1e-6
STEPS = 3


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def portable() -> Bundle:
    """The demo's model, U-shaped: convolutions, BatchNormalization, Dropout, AdamW."""
    return splitonnx.cut(
        MODEL, at=AT, tail_at=TAIL_AT, client_target="portable", server_target="portable"
    )


@pytest.fixture
def bundle(portable: Bundle, tmp_path: Path) -> Path:
    portable.save(tmp_path / "bundle")
    return tmp_path / "bundle"


def batches(count: int = STEPS, size: int = 8) -> list[dict[str, Any]]:
    random = np.random.default_rng(3)
    return [
        {
            "image": random.random((size, 1, 8, 8), np.float32),
            "labels": random.integers(0, 10, size),
        }
        for _ in range(count)
    ]


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name], value, rtol=0, atol=RTOL * (np.abs(value).max() or 1), err_msg=name
        )


def test_an_export_trains_and_predicts_with_the_same_server_as_its_source_does(
    bundle: Path,
) -> None:
    written = export(bundle / "client")
    assert written.path == str(bundle / "client-mobile")
    outcomes = []
    for folder in (bundle / "client", bundle / "client-mobile"):
        with (
            Server(bundle / "server", port=0, threads=1) as server,
            Client(folder, server.url, threads=1, trusted=True) as client,
        ):
            losses = [client.step(batch)["loss"] for batch in batches()]
            predicted = client.predict({"image": batches()[0]["image"]})
            outcomes.append({**client.state(), **predicted, "#losses": np.array(losses)})
    assert_close(outcomes[1], outcomes[0])


@pytest.mark.parametrize("name", ["chain", "residual", "convolutions", "dropout", "attention"])
def test_models_of_the_zoo_train_the_same_in_either_format(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    model = entry.build()
    cuts = [found.tensor for found in splitonnx.inspect(model)]
    made = cut(model, at=cuts[len(cuts) // 2], loss=entry.loss, client_target="portable")
    folder = tmp_path / "bundle"
    made.save(folder)
    export(folder / "client")
    data = entry.data(STEPS * 8)
    states = []
    for part in ("client", "client-mobile"):
        server = Executor(PartyBundle.load(folder / "server"), Engine(threads=1))
        link = connect_in_memory(server)
        with Client(folder / part, link, threads=1, trusted=True) as client:
            for start in range(0, STEPS * 8, 8):
                client.step({key: array[start : start + 8] for key, array in data.items()})
            states.append(client.state())
    assert_close(states[1], states[0])


def test_an_export_of_the_training_wheel_trains_on_stock_onnxruntime(
    bundle: Path, portable_python: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stock"
    export(bundle / "client", folder / "bundle" / "client")
    (bundle / "server").rename(folder / "bundle" / "server")
    size = 8
    given = batches()
    np.savez(
        folder / "data.npz",
        image=np.concatenate([batch["image"] for batch in given]),
        labels=np.concatenate([batch["labels"] for batch in given]),
    )
    script = Path(portable_training.__file__)
    done = subprocess.run(
        [portable_python, script, f"--batch={size}", folder],
        cwd=script.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    server = Executor(PartyBundle.load(folder / "bundle" / "server"), Engine(threads=1))
    with Client(bundle / "client", connect_in_memory(server), threads=1) as client:
        for batch in given:
            client.step(batch)
        expected = client.state()
    trained = np.load(folder / "trained.npz")
    for name, value in expected.items():
        limit = 1e-4 * (np.abs(value).max() or 1)  # another version's kernels
        np.testing.assert_allclose(trained[name], value, rtol=0, atol=limit, err_msg=name)


def test_an_export_of_stock_onnxruntime_trains_on_the_training_wheel(
    bundle: Path, portable_python: Path
) -> None:
    command = [
        str(portable_python),
        "-m",
        "splitonnx",
        "export",
        str(bundle / "client"),
        "--for",
        "mobile",
    ]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "converted by onnxruntime 1." in done.stdout
    states = []
    for folder in (bundle / "client", bundle / "client-mobile"):
        server = Executor(PartyBundle.load(bundle / "server"), Engine(threads=1))
        with Client(folder, connect_in_memory(server), threads=1, trusted=True) as client:
            for batch in batches():
                client.step(batch)
            states.append(client.state())
    assert_close(states[1], states[0])


def test_only_the_graphs_names_and_sums_differ_in_the_manifest(bundle: Path) -> None:
    export(bundle / "client")
    source = json.loads((bundle / "client" / "manifest.json").read_text())
    made = json.loads((bundle / "client-mobile" / "manifest.json").read_text())
    for name, digest in made["files"].items():
        content = (bundle / "client-mobile" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        assert content[4:8] == b"ORTM"
    graphs = [stage.pop("graph") for phase in source["phases"] for stage in phase["stages"]]
    renamed = [stage.pop("graph") for phase in made["phases"] for stage in phase["stages"]]
    assert renamed == [name.replace(".onnx", ".ort") for name in graphs]
    assert set(renamed) == made.pop("files").keys()
    assert source.pop("files").keys() == set(graphs)
    assert made.pop("sha256") != source.pop("sha256")
    assert made == source
    assert {path.name for path in (bundle / "client-mobile").iterdir()} == {
        "manifest.json",
        "weights.safetensors",
        OPERATORS,
        OPERATORS_AND_TYPES,
        *renamed,
    }


def test_what_training_came_to_is_exported_too(portable: Bundle, bundle: Path) -> None:
    with (
        Server(bundle / "server", port=0, threads=1) as server,
        Client(bundle / "client", server.url, threads=1) as client,
    ):
        client.step(batches()[0])
        client.save()
    written = export(bundle / "client")
    source, made = PartyBundle.load(bundle / "client"), PartyBundle.load(written.path)
    assert (made.step, made.session) == (1, source.session)
    assert written.state_bytes > 0
    assert_close(made.state(), source.state())
    sizes = [path.stat().st_size for path in Path(written.path).iterdir()]
    lists = [
        (Path(written.path) / name).stat().st_size for name in (OPERATORS, OPERATORS_AND_TYPES)
    ]
    manifest = (Path(written.path) / "manifest.json").stat().st_size
    assert written.total_bytes == sum(sizes) - sum(lists) - manifest


def test_the_runtime_takes_ort_format_from_trusted_makers_only(bundle: Path) -> None:
    export(bundle / "client")
    server = Executor(PartyBundle.load(bundle / "server"), Engine(threads=1))
    with (
        Client(bundle / "client-mobile", connect_in_memory(server)) as client,
        pytest.raises(ForbiddenGraph, match="own format, which is run for who trusts its maker"),
    ):
        client.step(batches()[0])


def test_what_is_no_ort_format_is_gated_also_for_a_trusted_maker() -> None:
    with pytest.raises(ForbiddenGraph):
        Engine(trusted=True).load("head.forward", b"no graph", training=False)


@pytest.mark.parametrize("kept", [8, 100, -8])
def test_ort_format_that_is_cut_short_is_an_error(kept: int) -> None:
    engine = Engine(threads=1, trusted=True)
    graph = tiny.split_bundle().client.graphs["head.forward.onnx"]
    converted = engine.convert("head.forward", graph, training=False)
    with pytest.raises(StageFailed, match=r"head\.forward"):
        engine.load("head.forward", converted[:kept], training=False)


def test_training_operators_are_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(MODEL, at=AT).save(tmp_path / "bundle")
    sentence = r"'head\.\w+\.onnx' has training operators .*BatchNorm.*--client-target portable$"
    for installed in (installed_runtime(), InstalledRuntime(version="1", training=False)):
        monkeypatch.setattr(engines, "installed_runtime", lambda found=installed: found)
        with pytest.raises(NotExportable, match=sentence):
            export(tmp_path / "bundle" / "client")
    assert not (tmp_path / "bundle" / "client-mobile").exists()


def test_training_operators_within_a_loop_are_found() -> None:
    grad = onnx.helper.make_node("ReluGrad", ["g", "y"], ["x"], domain="com.microsoft")
    body = onnx.helper.make_graph([grad], "body", [], [onnx.ValueInfoProto(name="x")])
    node = onnx.helper.make_node("If", ["c"], ["x"], then_branch=body, else_branch=body)
    graph = onnx.helper.make_graph([node], "g", [], [onnx.ValueInfoProto(name="x")])
    opsets = [
        onnx.helper.make_opsetid(domain, 1 if domain else 18) for domain in ("", "com.microsoft")
    ]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    counted = exports.count_operators("head.onnx", model.SerializeToString())
    assert counted == {"If": 1, "ReluGrad": 2}


def test_a_part_with_fused_kernels_that_every_runtime_has_is_exported_as_it_stands(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    party = PartyBundle.load(bundle / "client")
    manifest = msgspec.structs.replace(party.manifest, target="training")
    replace(party, manifest=manifest).save(bundle / "other")
    asked: dict[str, bool] = {}

    def note(self: Engine, name: str, graph: bytes, *, training: bool) -> bytes:
        asked[name] = training
        return convert(self, name, graph, training=training)

    convert = Engine.convert
    monkeypatch.setattr(Engine, "convert", note)
    export(bundle / "other")
    assert asked == {
        "head.forward": True,
        "tail.step": True,
        "head.backward": True,
        "update": True,
        "accumulate": True,
        "gradients": True,
        "weigh": False,
        "head.predict": False,
        "tail.predict": False,
        "evaluate": False,
    }


def test_the_lists_hold_every_operator_in_the_words_of_onnxruntime_s_build(bundle: Path) -> None:
    written = export(bundle / "client")
    needed: dict[str, dict[int, set[str]]] = {}
    for kernel in written.kernels:
        needed.setdefault(kernel.domain, {}).setdefault(kernel.version, set()).add(kernel.operator)
    for name, with_types in ((OPERATORS, False), (OPERATORS_AND_TYPES, True)):
        operators, types = parse_config(str(Path(written.path, name)), with_types)
        found = {d: {v: set(names) for v, names in group.items()} for d, group in operators.items()}
        assert found == needed
        assert (types is not None) is with_types
    assert needed.keys() == {"ai.onnx"}  # no fused operator came in
    assert "Conv" in needed["ai.onnx"][11]


def test_the_reduced_packages_of_old_could_not_run_any_bundle() -> None:
    """What the page says of them, held against ONNX Runtime's own list of what they had."""
    place = (
        resources.files("onnxruntime.tools.mobile_helpers")
        / "mobile_package.required_operators.config"
    )
    operators, _ = parse_config(str(place), False)
    assert {version for version in operators["ai.onnx"] if version > 1} == {12, 13, 14, 15}


def test_what_stands_in_the_way_is_replaced_with_force_and_only_an_export(bundle: Path) -> None:
    export(bundle / "client")
    with pytest.raises(BundleError, match="exists already"):
        export(bundle / "client")
    export(bundle / "client", overwrite=True)
    (bundle / "notes").mkdir()
    for place in ("client", "server", "notes"):
        before = sorted(path.name for path in (bundle / place).iterdir())
        with pytest.raises(BundleError, match="it is not an export, so it is not overwritten"):
            export(bundle / "client", bundle / place, overwrite=True)
        assert sorted(path.name for path in (bundle / place).iterdir()) == before
    with pytest.raises(BundleError, match="in ORT format already"):
        export(bundle / "client-mobile")


def test_an_export_that_breaks_off_leaves_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in bundle.iterdir())

    def write(path: Path, chunks: Any) -> None:
        if path.name == OPERATORS:
            raise OSError(28, "No space left on device")
        whole(path, chunks)

    whole = atomic.write_file
    monkeypatch.setattr(bundles, "write_file", write)
    with pytest.raises(BundleError, match="cannot be written: No space left"):
        export(bundle / "client")
    assert sorted(path.name for path in bundle.iterdir()) == before


def test_the_command_shows_sizes_and_needs(command: Command, bundle: Path) -> None:
    out = command.succeed("export", bundle / "client", "--for", "mobile")
    for word in ("head.forward.ort", "weights.safetensors", "altogether", "onnxruntime-android"):
        assert word in out
    place = bundle / "app"
    found = json.loads(
        command.succeed("export", bundle / "client", "--for", "mobile", "-o", place, "--json")
    )
    graphs = sum(graph["ort_bytes"] for graph in found["graphs"])
    assert found["total_bytes"] == graphs + found["weights_bytes"]
    assert found["path"] == str(place)
    assert "overwrite it with --force" in command.fail(
        "export", bundle / "client", "--for", "mobile", "-o", place
    )
    again = ("export", bundle / "client", "--for", "mobile", "-o", place, "--force", "--quiet")
    assert command.succeed(*again) == ""
    assert "--for" in command.fail("export", bundle / "client")


def test_the_commands_run_an_export_that_is_trusted(
    command: Command, bundle: Path, tmp_path: Path
) -> None:
    export(bundle / "client")
    (batch,) = batches(1)
    np.savez(tmp_path / "data.npz", **batch)
    with Server(bundle / "server", port=0, threads=1) as server:
        files = ("--data", tmp_path / "data.npz", "-o", tmp_path / "out.npz")
        predict = ("predict", bundle / "client-mobile", "--server", server.url, *files)
        assert "own format" in command.fail(*predict)
        command.succeed(*predict, "--trusted")
        train = ("train", bundle / "client-mobile", "--server", server.url, *files[:2])
        assert command(*train)[0] == 2
        command.succeed(*train, "--trusted", "--quiet", "--restart")
    assert np.load(tmp_path / "out.npz")["logits"].shape == (8, 10)
