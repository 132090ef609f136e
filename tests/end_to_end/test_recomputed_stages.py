"""A forward stage that is computed again in place of keeping its values changes no bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.manifests import Role
from splitonnx.messages import TaskKey
from splitonnx.names import TRAIN, Target
from splitonnx.optimizers import SGD, AdamW
from splitonnx.partitioner.cutting.transforms.crossings import encode_crossings
from splitonnx.partitioner.cutting.transforms.recomputations import recompute_stages
from splitonnx.partitioner.partitions import cut, cut_prepared
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.explanations import explain
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.estimates import Estimates
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.wire_codecs import read_wire
from tests.end_to_end.test_accumulated_steps import list_cuts, prepare_zoo
from tests.support.carried import RECURRENT, build_recurrent
from tests.support.carried import draw_data as draw_recurrent
from tests.support.zoo import ZOO, Arrays

ROWS, STEPS, PARTS = 7, 3, 3


def cut_zoo(name: str, shape: str, target: Target = "training") -> Bundle:
    cuts = list_cuts(name)
    vanilla = (cuts[len(cuts) // 2], ())
    at, tail = vanilla if shape == "vanilla" else (cuts[len(cuts) // 3], cuts[-1])
    return cut_prepared(
        prepare_zoo(name),
        at=at,
        tail_at=tail,
        loss=ZOO[name].loss,
        optimizer=AdamW(lr=1e-2, clip_norm=1.0),
        client_target=target,
        server_target=target,
    )


def train(bundle: Bundle, batches: list[Arrays], accumulate: int = 1) -> dict[str, bytes]:
    """Train both parties; return the bytes of all they have learned, and of all results."""
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1) as client:
        results = [client.step(batch, accumulate=accumulate) for batch in batches]
        link.drain()
        state = {**client.state(), **link.executor.state()}
    told = {f"{n}@{i}": a.tobytes() for i, one in enumerate(results) for n, a in one.items()}
    return {**{name: array.tobytes() for name, array in state.items()}, **told}


def count_repeating(bundle: Bundle) -> int:
    return sum(
        bool(stage.awaited)
        for party in bundle.parties.values()
        for stage in party.manifest.phase(TRAIN).stages
    )


@pytest.mark.parametrize("accumulate", [1, PARTS])
@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("shape", ["vanilla", "U-shaped"])
@pytest.mark.parametrize("name", ZOO)
def test_each_party_learns_the_same_bits(
    name: str, shape: str, target: Target, accumulate: int
) -> None:
    plain = cut_zoo(name, shape, target)
    made = recompute_stages(plain, "both")
    assert count_repeating(made) > 0
    batches = [ZOO[name].data(ROWS, seed=seed) for seed in range(STEPS)]
    assert train(made, batches, accumulate) == train(plain, batches, accumulate)


@pytest.mark.parametrize("wire", ["int8", "fwd=randtopk=0.25,bwd=bf16", "bwd=topk=0.25+ef"])
def test_codecs_send_and_keep_the_same_bits(wire: str) -> None:
    entry = ZOO["convolutions"]
    dims: dict[str, int | str] = {"N": ROWS} if "+ef" in wire else {}
    plain = cut(entry.build(), at="r1", tail_at="flat", loss=entry.loss, dims=dims, check=False)
    plain = encode_crossings(plain, read_wire(wire))
    made = recompute_stages(plain, "both")
    assert count_repeating(made) >= 2
    batches = [entry.data(ROWS, seed=seed) for seed in range(STEPS)]
    assert train(made, batches) == train(plain, batches)


@pytest.mark.parametrize(("at", "tail_at"), [("h", ()), ("h", "p"), ("a", "p")])
def test_states_are_carried_once_a_step(at: str, tail_at: str | tuple[str, ...]) -> None:
    model = build_recurrent()
    plain = cut(
        model,
        at=at,
        tail_at=tail_at,
        loss="mse",
        dims={"N": ROWS},
        states=RECURRENT,
        optimizer=SGD(lr=0.1, momentum=0.9),
        check=False,
    )
    made = recompute_stages(plain, "both")
    data = draw_recurrent(ROWS * STEPS)
    batches = [
        {name: array[i : i + ROWS] for name, array in data.items()}
        for i in range(0, ROWS * STEPS, ROWS)
    ]
    assert train(made, batches) == train(plain, batches)


def open_step(bundle: Bundle, data: Arrays) -> tuple[Executor, TaskKey, Arrays]:
    """Run a client's forward stage; return what it sends, with the task still open."""
    executor = Executor(bundle.client, Engine(threads=1))
    key = TaskKey("a" * 32, TRAIN, 0, 0)
    executor.begin(key, data=data, seed=0, learning_rate=0.1)
    sent = {name: array for wires in executor.advance(key) for name, array in wires.items()}
    return executor, key, sent


def list_held(executor: Executor, key: TaskKey) -> set[str]:
    return set(executor._tasks[key].values)


@pytest.mark.parametrize("name", ["convolutions", "batchnorm_trained", "dropout"])
def test_between_forward_and_backward_a_client_holds_only_its_inputs(name: str) -> None:
    plain = cut_zoo(name, "vanilla")
    data = ZOO[name].data(ROWS)
    given = {spec.name for spec in plain.client.manifest.phase(TRAIN).data}
    scalars = {"splitonnx.key", "splitonnx.learning_rate", "splitonnx.step"}
    statistics = set(plain.client.manifest.phase(TRAIN).commits.values())
    kept = list_held(*open_step(plain, data)[:2]) - given - scalars - statistics
    assert kept
    executor, key, sent = open_step(recompute_stages(plain, "client"), data)
    assert list_held(executor, key) <= given | scalars | statistics
    wires = executor.manifest.phase(TRAIN).wires
    (gradient,) = [wire.tensor.name for wire in wires if wire.receiver == "client"][:1]
    activation = sent[gradient.removesuffix("_grad")]
    executor.deliver(key, {gradient: np.ones_like(activation)})
    list(executor.advance(key))
    assert not kept & list_held(executor, key)


def test_running_statistics_move_once_a_step() -> None:
    made = recompute_stages(cut_zoo("batchnorm_trained", "vanilla"), "client")
    plain = cut_zoo("batchnorm_trained", "vanilla")
    buffers = [s.tensor.name for s in made.client.manifest.state if s.role is Role.BUFFER]
    batch = ZOO["batchnorm_trained"].data(ROWS)
    once, twice = train(plain, [batch]), train(plain, [batch, batch])
    found = train(made, [batch])
    assert buffers
    for name in buffers:
        assert found[name] == once[name] != twice[name]


def test_a_server_reserves_less_memory_for_a_task_that_waits() -> None:
    plain = cut_zoo("wide_convolutions", "U-shaped")
    made = recompute_stages(plain, "server")
    assert plain.server is not None
    assert made.server is not None
    before, after = (
        Estimates(party.manifest, party.graphs).measure(TRAIN, {"N": 512})
        for party in (plain.server, made.server)
    )
    assert after <= before


def test_what_leaves_a_client_is_explained_as_before() -> None:
    plain = cut_zoo("convolutions", "U-shaped")
    before, after = (explain(b.client) for b in (plain, recompute_stages(plain, "both")))
    for one, other in zip(before.phases, after.phases, strict=True):
        assert (one.leaves, one.arrives, one.arrays) == (other.leaves, other.arrives, other.arrays)


def forget_waiting(party: PartyBundle) -> PartyBundle:
    """Return a party as a runtime sees it that does not know ``after``."""
    phases = tuple(
        msgspec.structs.replace(
            phase,
            stages=tuple(msgspec.structs.replace(s, after=msgspec.UNSET) for s in phase.stages),
        )
        for phase in party.manifest.phases
    )
    return replace(party, manifest=msgspec.structs.replace(party.manifest, phases=phases))


def test_a_runtime_that_does_not_know_such_stages_computes_the_same() -> None:
    plain = cut_zoo("batchnorm_trained", "U-shaped")
    made = recompute_stages(plain, "both")
    old = replace(made, parties={n: forget_waiting(p) for n, p in made.parties.items()})
    assert count_repeating(old) == 0
    batches = [ZOO["batchnorm_trained"].data(ROWS, seed=seed) for seed in range(STEPS)]
    assert train(old, batches) == train(plain, batches)


def test_a_bundle_on_disk_says_what_is_computed_again(tmp_path: Path) -> None:
    made = recompute_stages(cut_zoo("convolutions", "U-shaped"), "both")
    made.save(tmp_path / "bundle")
    found = Bundle.load(tmp_path / "bundle")
    assert found.manifest.recipe.recompute == made.manifest.recipe.recompute
    assert count_repeating(found) == count_repeating(made) > 0
