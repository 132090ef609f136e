"""The two parts of a model in folders of their own, as on two machines, and tokens for the server.

The bundle's folder has the client's part, which is trained there, and the server's part as it was
cut.  The server trains a copy of it elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from splitonnx.bundles import Bundle
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.edge.tokens import Role, Tokens, add_token
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.servers import Server
from tests.support.zoo import ZOO

SAMPLES = 8
SIZE = 4
"""Samples of a step."""


@dataclass(frozen=True, kw_only=True)
class Parted:
    """The folders, and the texts of tokens: of ``ana`` by role, and of ``ben`` to fetch."""

    bundle: Path
    host: Path
    tokens: Mapping[str, str] = field(repr=False)
    model: str = "chain"
    """The name of the model in the zoo."""

    @property
    def client(self) -> Path:
        return self.bundle / "client"

    def credentials(self, name: str = "fetch") -> Credentials:
        return Credentials(token=self.tokens[name])

    def train(
        self, url: str, *, token: str | None = "trains", epochs: int = 1, seed: int = 0
    ) -> str:
        """Train the client's part from where it is, and give the name of the session."""
        credentials = None if token is None else self.credentials(token)
        with Client(self.client, url, threads=1, credentials=credentials, share=True) as client:
            client.fit(ZOO[self.model].data(SAMPLES, seed), epochs=epochs, batch_size=SIZE)
            client.save()
            return client.session

    def keep_client(self) -> Path:
        """Copy the bundle's folder as it is now."""
        place = self.bundle.with_name("kept")
        shutil.copytree(self.bundle, place)
        return place

    @contextmanager
    def serve(
        self, *, has_tokens: bool = True, policy: PolicyOptions | None = None
    ) -> Iterator[Server]:
        known = Tokens.read(self.host.parent / "tokens") if has_tokens else None
        with Server(
            self.host, port=0, threads=1, tokens=known, isolate=False, policy=policy
        ) as server:
            yield server

    def merge_side_by_side(self, place: Path) -> bytes:
        """Put both trained parts into one folder, as on one machine, and merge them there."""
        shutil.copytree(self.bundle, place)
        shutil.rmtree(place / "server")
        shutil.copytree(self.host, place / "server")
        return merge(place)


def make_parted(folder: Path, bundle: Bundle | None = None, *, model: str = "chain") -> Parted:
    """Part the folders of a model of the zoo, which is cut first unless that is done."""
    made = bundle or cut(ZOO[model].build(), at="act1", loss=ZOO[model].loss)
    made.save(folder / "bundle")
    shutil.copytree(folder / "bundle" / "server", folder / "host")
    file = folder / "tokens"
    tokens = {role.value: add_token(file, "ana", [role]) for role in Role}
    tokens["trains"] = add_token(file, "ana", [Role.TRAIN, Role.PUBLISH])
    tokens["whole"] = add_token(file, "ana")
    tokens["ben"] = add_token(file, "ben", [Role.FETCH])
    return Parted(bundle=folder / "bundle", host=folder / "host", tokens=tokens, model=model)
