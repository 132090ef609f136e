"""One client's training at the server: each step once, whatever comes again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import ForeignSession
from splitonnx.messages import Save, Saved, Tensors, Unsaved
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.registries import Registry
from tests.support.callers import ACTIVATION, GRADIENT, SESSION, Caller, expect_fault, make_task
from tests.support.zoo import ZOO


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


def test_a_repeated_message_gets_the_same_reply_and_is_not_acted_on_again(bundle: Bundle) -> None:
    caller = Caller(bundle)
    (first,) = caller.say(make_task(), ACTIVATION)
    computed = caller.tensors
    assert caller.say(make_task(), ACTIVATION) == [first]
    assert all(caller.tensors[name] is not computed[name] for name in computed)
    for name, array in computed.items():
        np.testing.assert_array_equal(caller.tensors[name], array)
    (last,) = caller.say(make_task(turn=1), GRADIENT)
    assert caller.step == 1
    assert caller.say(make_task(turn=1), GRADIENT) == [last]
    assert caller.say(make_task(), ACTIVATION) == [first]
    assert caller.step == 1


def test_a_step_that_was_made_is_not_made_again_with_other_inputs(bundle: Bundle) -> None:
    caller = Caller(bundle)
    caller.say(make_task(), ACTIVATION)
    caller.say(make_task(turn=1), GRADIENT)
    other = {"act1@server": np.zeros((2, 7), np.float32)}
    expect_fault(caller.say(make_task(), other), "StepConflict", "step 0 was made already")
    assert caller.step == 1


def test_a_step_that_began_may_begin_again_on_another_connection_with_other_inputs(
    bundle: Bundle,
) -> None:
    assert bundle.server is not None
    registry = Registry(Executor(bundle.server, Engine(threads=1)))
    Caller(bundle, registry).say(make_task(), ACTIVATION)
    again = Caller(bundle, registry, generation=2)
    (reply,) = again.say(make_task(), {"act1@server": np.zeros((3, 7), np.float32)})
    assert isinstance(reply, Tensors)
    assert {array.shape for array in again.tensors.values()} == {(3, 6)}


def test_saving_in_memory_is_refused_and_saving_to_disk_is_answered(
    bundle: Bundle, tmp_path: Path
) -> None:
    (answer,) = Caller(bundle).say(Save(session=SESSION, step=0))
    assert isinstance(answer, Unsaved)
    assert "no folder" in answer.reason
    bundle.save(tmp_path / "bundle")
    caller = Caller(Bundle.load(tmp_path / "bundle"))
    assert caller.say(Save(session=SESSION, step=0)) == [Saved(session=SESSION, step=0)]
    assert not (tmp_path / "bundle" / "server" / "state.safetensors").exists()
    caller.say(Save(session=SESSION, step=0, publish=True))
    assert (tmp_path / "bundle" / "server" / "state.safetensors").exists()


def test_a_state_to_keep_is_kept_and_the_reply_says_so(bundle: Bundle, tmp_path: Path) -> None:
    bundle.save(tmp_path / "bundle")
    caller = Caller(Bundle.load(tmp_path / "bundle"))
    kept = Saved(session=SESSION, step=0, keep=True)
    assert caller.say(Save(session=SESSION, step=0, keep=True)) == [kept]
    folder = tmp_path / "bundle" / "server" / "sessions" / SESSION
    assert [path.name for path in folder.iterdir()] == ["0.best.safetensors"]


@pytest.mark.parametrize("step", [1, 7])
def test_a_step_at_which_the_server_is_not_is_not_saved(bundle: Bundle, step: int) -> None:
    expect_fault(
        Caller(bundle).say(Save(session=SESSION, step=step)),
        "RemoteProtocolError",
        f"save step {step}",
    )


def test_a_session_is_its_owner_s_alone(bundle: Bundle) -> None:
    session = Caller(bundle, owner="ann").dispatcher.session
    assert session is not None
    session.require_owner("ann")
    for other in ("bob", ""):
        with pytest.raises(ForeignSession):
            session.require_owner(other)
