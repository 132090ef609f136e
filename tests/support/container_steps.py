"""The Containerfile's steps without a container engine: its RUN lines in an empty folder.

    python -m tests.support.container_steps [training|portable]    # `make container-steps`

What COPY names is copied, RUN is run with its paths put under that folder, and ENTRYPOINT and CMD
are started as USER, who can write to the bundle's folder alone, with no capability left.  A client
of this environment then trains against it.  As somebody else than root it runs as oneself.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from splitonnx import Client
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.edge.tokens import add_token
from tests.conftest import ROOT
from tests.support.zoo import ZOO

FILE = ROOT / "Containerfile"


@dataclass(kw_only=True)
class Recipe:
    """What a Containerfile says: the last USER, ENTRYPOINT and CMD, and all of the rest."""

    copies: list[tuple[list[str], str]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


def read_recipe(text: str, arguments: Mapping[str, str]) -> Recipe:
    """Read a Containerfile, with the build's arguments put in."""
    recipe, known = Recipe(), dict(arguments)
    for line in re.sub(r"\\\n", " ", text).splitlines():
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        match word:
            case "ARG":
                name, _, default = rest.partition("=")
                known.setdefault(name, default)
            case "COPY" if not rest.startswith("--from"):
                *names, target = rest.split()
                recipe.copies.append((names, target))
            case "RUN":
                filled = re.sub(r'"?\$\{?(\w+)\}?"?', lambda m: known[m[1]], rest)
                recipe.runs.append(filled)
            case "ENV":
                recipe.environment |= dict(item.split("=", 1) for item in shlex.split(rest))
            case "USER":
                recipe.user = rest
            case "ENTRYPOINT":
                recipe.entrypoint = json.loads(rest)
            case "CMD":
                recipe.command = json.loads(rest)
    return recipe


def copy_sources(recipe: Recipe, source: Path) -> None:
    """Copy what the COPY lines name, as the build's context would hold it."""
    source.mkdir()
    for names, target in recipe.copies:
        for name in names:
            if (ROOT / name).is_dir():
                unwanted = shutil.ignore_patterns("__pycache__", "node_modules", "js")
                shutil.copytree(ROOT / name, source / target, symlinks=True, ignore=unwanted)
            else:
                shutil.copy(ROOT / name, source / target)


def find_python(root: Path) -> Path:
    """Find a Python that every user may run: this one, or a copy of it, as FROM would bring one."""
    base = Path(sys.base_prefix)
    if all(folder.stat().st_mode & 0o005 == 0o005 for folder in (base, *base.parents)):
        return Path(sys.executable)
    unwanted = shutil.ignore_patterns("__pycache__", "test", "site-packages")
    shutil.copytree(base, root / "python", symlinks=True, ignore=unwanted)
    return root / "python" / "bin" / f"python3.{sys.version_info.minor}"


def build(recipe: Recipe, root: Path) -> None:
    """Run the RUN lines, with ``/opt`` under ``root``."""
    copy_sources(recipe, root / "src")
    python = str(find_python(root))
    settings = {"PATH": os.environ["PATH"], "HOME": str(root), "PYTHON": python}
    for name in ("PIP_INDEX_URL", "PIP_CONFIG_FILE"):  # where this machine has its packages
        if name in os.environ:
            settings[name] = os.environ[name]
    for line in recipe.runs:
        command = line.replace("/opt/", f"{root}/opt/")
        subprocess.run(command, shell=True, cwd=root / "src", check=True, env=settings)
    for path in [root / "opt", *(root / "opt").rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)


def start(recipe: Recipe, root: Path) -> subprocess.Popen[str]:
    """Start the server as the image would, as its user, with its bundle's folder as only place."""
    words = [*recipe.entrypoint, *recipe.command, "--port", "0"]
    places = {"/opt/": f"{root}/opt/", "/etc/": f"{root}/etc/"}
    for place, real in places.items():
        words = [word.replace(place, real) if word.startswith(place) else word for word in words]
    words = [str(root / "bundle" / "server") if word == "/bundle" else word for word in words]
    words[words.index("0.0.0.0")] = "127.0.0.1"
    environment = {"PATH": "/usr/bin:/bin", **recipe.environment}
    if (root / "python").exists():  # its library is looked for where it was built, out of reach
        environment["LD_LIBRARY_PATH"] = str(root / "python" / "lib")
    user = group = None
    if os.geteuid() == 0:
        user, group = map(int, recipe.user.split(":"))
        for path in [root / "bundle" / "server", *(root / "bundle" / "server").rglob("*")]:
            os.chown(path, user, group)
        os.chown(root / "etc" / "splitonnx" / "tokens", user, group)
    return subprocess.Popen(
        words,
        env=environment,
        cwd=root / "bundle",
        stderr=subprocess.PIPE,
        text=True,
        user=user,
        group=group,
        extra_groups=None if user is None else [],
    )


def train(root: Path, url: str, token: str) -> None:
    """Train against the server, and let both sides save."""
    with Client(
        root / "bundle" / "client", url, credentials=Credentials(token=token), threads=1
    ) as client:
        history = client.fit(ZOO["chain"].data(24), batch_size=8, save=True)
    assert np.isfinite([record.loss for record in history.steps]).all()
    assert (root / "bundle" / "server" / "state.safetensors").exists()


def find_writable(root: Path, user: int) -> list[Path]:
    """Find what of the installation the server's user might write to."""
    found = [path for path in (root / "opt").rglob("*") if not path.is_symlink()]
    return [path for path in found if path.stat().st_mode & 0o002 or path.stat().st_uid == user]


def main(kind: str) -> None:
    """Carry the steps out for one kind of runtime."""
    recipe = read_recipe(FILE.read_text(), {"RUNTIME": kind})
    with tempfile.TemporaryDirectory(prefix="splitonnx-container-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        build(recipe, root)
        target: Target = "portable" if kind == "portable" else "training"
        whole = ZOO["chain"].build()
        cut(whole, at="act1", tail_at="act3", server_target=target).save(root / "bundle")
        (root / "etc" / "splitonnx").mkdir(parents=True)
        token = add_token(root / "etc" / "splitonnx" / "tokens", "ana")
        process = start(recipe, root)
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"ws://[^\s\"]+", line)
            if found is None:
                process.terminate()  # or there would be no end to read to
                raise AssertionError(line + process.stderr.read())
            status = Path(f"/proc/{process.pid}/status").read_text()
            uid = int(re.findall(r"Uid:\s+(\d+)", status)[0])
            if os.geteuid() == 0:
                assert uid == int(recipe.user.split(":")[0])
                assert not find_writable(root, uid)
                assert int(re.findall(r"CapEff:\s+(\w+)", status)[0], 16) == 0
            train(root, found[0], token)
        finally:
            process.terminate()
            process.communicate(timeout=60)
        assert process.returncode == 0, process.returncode
        for path in [root / "opt", *(root / "opt").rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)  # so that it can be removed
        print(f"{kind}: built, served as user {uid} without a capability, trained, stopped")


if __name__ == "__main__":
    for kind in sys.argv[1:] or ("training", "portable"):
        main(kind)
