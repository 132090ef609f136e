"""A bundle gets the server's part from a running server, or a sentence says why not."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import (
    BundleMismatch,
    NotPermitted,
    NotSaved,
    StateNotFetched,
    Unauthorized,
    UnwritableFile,
    UsageError,
)
from splitonnx.optimizers import AdamW
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.channels.queries.server_parts import collect
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.servers import Server
from splitonnx.states import read_state
from tests.support import tiny
from tests.support.parted import SAMPLES, SIZE, Parted, make_parted
from tests.support.zoo import ZOO


@pytest.fixture
def parted(tmp_path: Path) -> Parted:
    return make_parted(tmp_path)


@pytest.fixture
def server(parted: Parted) -> Iterator[Server]:
    with parted.serve() as running:
        yield running


@pytest.mark.parametrize(
    ("name", "at", "tail_at"),
    [("chain", "act1", ()), ("batchnorm_trained", "r1", ("c2",)), ("embedding", "bent", ())],
)
def test_the_merged_model_is_to_the_bit_that_of_both_folders_on_one_machine(
    tmp_path: Path, name: str, at: str, tail_at: tuple[str, ...]
) -> None:
    entry = ZOO[name]
    made = cut(entry.build(), at=at, tail_at=tail_at, loss=entry.loss, optimizer=AdamW(lr=1e-2))
    parted = make_parted(tmp_path, made, model=name)
    untrained = merge(made)
    with parted.serve() as server:
        parted.train(server.url)
        found = collect(parted.bundle, server.url, credentials=parted.credentials())
    assert merge(found) == parted.merge_side_by_side(tmp_path / "whole") != untrained


def test_every_tensor_of_the_server_comes_as_it_was_saved(parted: Parted, server: Server) -> None:
    parted.train(server.url)
    found = collect(parted.client, server.url, credentials=parted.credentials()).server
    assert found is not None
    assert found.trained is not None
    expected = read_state(parted.host, found.manifest)
    assert expected is not None
    assert found.trained.keys() == expected.tensors.keys()
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(found.trained[name], array)
    for name, array in found.weights.items():
        assert not np.array_equal(found.trained[name], array)


@pytest.mark.parametrize("name", ["train", "publish", "operate", "trains", "whole"])
def test_a_token_with_another_role_does_not_read_the_server_s_part(
    parted: Parted, server: Server, name: str
) -> None:
    parted.train(server.url)
    with pytest.raises(NotPermitted, match="lacks the role 'fetch'"):
        collect(parted.bundle, server.url, credentials=parted.credentials(name))


def test_without_a_known_token_nothing_is_read(parted: Parted, server: Server) -> None:
    parted.train(server.url)
    with pytest.raises(Unauthorized, match="--token-file"):
        collect(parted.bundle, server.url)


def test_a_server_without_tokens_hands_its_part_to_nobody(parted: Parted) -> None:
    with parted.serve(has_tokens=False) as server:
        parted.train(server.url, token=None)
        for credentials in (None, parted.credentials()):
            with pytest.raises(Unauthorized, match="without tokens hands out no state"):
                collect(parted.bundle, server.url, credentials=credentials)


def test_another_owner_s_session_is_as_one_that_does_not_exist(
    parted: Parted, server: Server, tmp_path: Path
) -> None:
    parted.train(server.url)
    with pytest.raises(StateNotFetched) as foreign:
        collect(parted.bundle, server.url, credentials=parted.credentials("ben"))
    assert "token of the same owner" in str(foreign.value)
    shutil.rmtree(parted.host)
    shutil.copytree(parted.bundle / "server", parted.host)
    with pytest.raises(StateNotFetched) as missing:
        collect(parted.bundle, server.url, credentials=parted.credentials())
    assert str(missing.value) == str(foreign.value)


def test_a_session_that_was_trained_before_there_were_tokens_is_for_who_may_fetch(
    parted: Parted, tmp_path: Path
) -> None:
    with parted.serve(has_tokens=False) as server:
        parted.train(server.url, token=None)
    with parted.serve() as server:
        found = collect(parted.bundle, server.url, credentials=parted.credentials("ben"))
    assert merge(found) == parted.merge_side_by_side(tmp_path / "whole")


def test_a_server_that_is_at_another_step_is_refused_with_both_steps_and_what_to_do(
    parted: Parted, server: Server
) -> None:
    saved = parted.host / "state.safetensors"
    with Client(
        parted.client, server.url, threads=1, credentials=parted.credentials("trains")
    ) as client:
        for _ in range(2):
            client.fit(ZOO["chain"].data(SAMPLES), batch_size=SIZE)
            client.save()
            if not (parted.bundle.with_name("kept")).exists():
                earlier, state = parted.keep_client(), saved.read_bytes()
    session = client.session
    with pytest.raises(BundleMismatch) as behind:
        collect(earlier, server.url, credentials=parted.credentials())
    for part in ("2 (client)", "4 (server)", f"as session {session[:8]} left it at step 4"):
        assert part in str(behind.value)
    found = collect(parted.bundle, server.url, credentials=parted.credentials())
    assert found.server is not None
    assert (found.client.step, found.server.step) == (4, 4)
    saved.write_bytes(state)  # the server's folder comes from a backup
    with pytest.raises(BundleMismatch) as ahead:
        collect(parted.bundle, server.url, credentials=parted.credentials())
    assert "4 (client) here and 2 (server) there" in str(ahead.value)
    assert collect(earlier, server.url, credentials=parted.credentials()).client.step == 2


def test_of_several_sessions_that_of_the_client_s_newest_state_or_the_named_one_is_fetched(
    parted: Parted, server: Server, tmp_path: Path
) -> None:
    first = parted.train(server.url)
    expected = parted.merge_side_by_side(tmp_path / "first")
    second = parted.train(server.url, epochs=2)
    assert first != second
    newest = collect(parted.bundle, server.url, credentials=parted.credentials())
    assert newest.client.session == second
    assert merge(newest) == parted.merge_side_by_side(tmp_path / "second") != expected
    for name in (first, first[:8]):
        found = collect(parted.bundle, server.url, credentials=parted.credentials(), session=name)
        assert merge(found) == expected
    with pytest.raises(UsageError, match=f"no session named 0{{32}}.*{first}") as raised:
        collect(parted.bundle, server.url, credentials=parted.credentials(), session="0" * 32)
    assert second in str(raised.value)


def test_a_bundle_in_memory_has_one_session(parted: Parted, server: Server) -> None:
    session = parted.train(server.url)
    bundle = Bundle.load(parted.bundle)
    found = collect(bundle, server.url, credentials=parted.credentials(), session=session[:4])
    assert found.server is not None
    assert found.server.session == session
    with pytest.raises(UsageError, match=f"of session {session}"):
        collect(bundle, server.url, credentials=parted.credentials(), session="x")


@pytest.mark.parametrize("policy", ["splitfed-v1", "sequential"])
def test_of_joint_training_the_joined_model_is_fetched_by_each_client(
    tmp_path: Path, policy: str
) -> None:
    ana = make_parted(tmp_path / "ana")
    bens = tmp_path / "ben"
    shutil.copytree(ana.bundle, bens)
    ben = Parted(bundle=bens, host=ana.host, tokens=ana.tokens)
    options = PolicyOptions(name=policy, clients_min=2, local_steps=1, rounds=3)
    with ana.serve(policy=options) as server:
        threads = [
            threading.Thread(target=one.train, args=(server.url,), kwargs={"epochs": 2, "seed": n})
            for n, one in enumerate((ana, ben))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        assert server._registry.policy.report().closed == 3
        merged = [
            merge(collect(one.bundle, server.url, credentials=one.credentials()))
            for one in (ana, ben)
        ]
    places = (tmp_path / "whole of ana", tmp_path / "whole of ben")
    assert merged == [
        one.merge_side_by_side(place) for one, place in zip((ana, ben), places, strict=True)
    ]
    assert merged[0] == merged[1]


# --- what cannot be merged ----------------------------------------------------------------------


def test_a_client_that_was_not_trained_is_told(parted: Parted, server: Server) -> None:
    with pytest.raises(UsageError, match="no finished training with a server"):
        collect(parted.bundle, server.url, credentials=parted.credentials())


def test_a_client_whose_token_may_not_publish_has_nothing_to_merge(
    parted: Parted, server: Server
) -> None:
    with pytest.raises(NotSaved, match="publish"):
        parted.train(server.url, token="train")
    with pytest.raises(UsageError, match="train to the end with a token that may publish"):
        collect(parted.bundle, server.url, credentials=parted.credentials())


def test_a_model_that_was_not_cut_is_told(tmp_path: Path) -> None:
    whole = cut(ZOO["chain"].build(), at=None, loss=ZOO["chain"].loss)
    with pytest.raises(UsageError, match="no server's part; merge it without --from"):
        collect(whole, "ws://127.0.0.1:1")


@pytest.mark.parametrize("name", ["client", "moved", "server"])
def test_a_party_s_folder_alone_is_told_where_to_put_it(tmp_path: Path, name: str) -> None:
    bundle = tiny.split_bundle()
    place = tmp_path / "alone" / name
    place.parent.mkdir()
    (bundle.parties.get(name) or bundle.client).save(place)
    with pytest.raises(UsageError, match=r"put it as 'client' into the folder that .* wrote"):
        collect(place, "ws://127.0.0.1:1")


def test_without_the_server_s_folder_as_it_was_cut_nothing_is_asked(parted: Parted) -> None:
    shutil.rmtree(parted.bundle / "server")
    with pytest.raises(UsageError, match="has no folder 'server'; put the server's folder back"):
        collect(parted.bundle, "ws://127.0.0.1:1")


def test_a_server_of_another_bundle_is_refused(parted: Parted, server: Server) -> None:
    session = parted.train(server.url)
    entry = ZOO["chain"]
    other = make_parted(
        parted.bundle.parent / "other", cut(entry.build(), at="act3", loss=entry.loss)
    )
    with other.serve() as elsewhere:
        own = other.train(elsewhere.url)
        state = other.host / "state.safetensors"
        state.write_bytes(state.read_bytes().replace(own.encode(), session.encode()))
        with pytest.raises(BundleMismatch, match=r"digest .* name the server that serves"):
            collect(parted.bundle, elsewhere.url, credentials=other.credentials())


def test_where_the_state_cannot_be_kept_it_is_said(parted: Parted, server: Server) -> None:
    parted.train(server.url)
    with pytest.raises(UnwritableFile, match="nowhere"):
        collect(
            parted.bundle,
            server.url,
            credentials=parted.credentials(),
            folder=parted.bundle / "nowhere",
        )
