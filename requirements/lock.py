"""Write the lock files of this folder, or check that they still belong to pyproject.toml.

    python requirements/lock.py          # write them: `make lock`, which brings uv
    python requirements/lock.py --check  # part of `make lint`; needs no network

Each file names every package that is installed, with the SHA-256 of each of its files, for Python
3.11 and 3.12 on every platform that has them.  Its first line holds a digest of what it was made
from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
PROJECT = FOLDER.parent / "pyproject.toml"
TOOLS = FOLDER / "tools.in"

LOCKS: dict[str, list[str]] = {
    "dev": ["--extra", "cpu", "--group", "dev"],
    "demo": ["--extra", "cpu", "--group", "demo"],
    "browser": ["--group", "browser", "--extra", "cpu", "--group", "dev"],
    "fuzz": ["--group", "fuzz", "--extra", "cpu", "--group", "dev"],
    "lock": ["--only-group", "lock"],
    "sbom": ["--only-group", "sbom"],
    "serve-training": ["--extra", "cpu", "--extra", "fast"],
    "serve-portable": ["--extra", "portable", "--extra", "fast"],
    "openvino": ["--extra", "openvino"],
}
"""By the file's name, what of pyproject.toml goes into it; the tools go into each."""


def compute_digest(name: str) -> str:
    """Compute the digest of what a lock file is made from."""
    project = tomllib.loads(PROJECT.read_text())
    inputs = {
        "options": LOCKS[name],
        "python": project["project"]["requires-python"],
        "dependencies": project["project"]["dependencies"],
        "extras": project["project"]["optional-dependencies"],
        "groups": project["dependency-groups"],
        "build": project["build-system"]["requires"],
        "tools": [line for line in TOOLS.read_text().splitlines() if not line.startswith("#")],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def find_stale() -> list[str]:
    """Return the names of lock files that are missing or were made from something else."""
    stale = []
    for name in LOCKS:
        path = FOLDER / f"{name}.txt"
        first = path.read_text().partition("\n")[0] if path.exists() else ""
        if first != f"# made from {compute_digest(name)} by `make lock`; do not edit":
            stale.append(name)
    return stale


def write(name: str, uv: str) -> None:
    """Write one lock file."""
    options = list(LOCKS[name])
    sources = [str(TOOLS)]
    if options[0] == "--only-group":
        options[0] = "--group"
    else:
        sources.insert(0, str(PROJECT))
    command = [
        uv, "pip", "compile", *sources, *options, "--universal", "--python-version", "3.11",
        "--generate-hashes", "--no-header", "--no-annotate", "--quiet",
    ]  # fmt: skip
    if name != "dev":  # one version of each package in all of them
        command += ["--constraint", str(FOLDER / "dev.txt")]
    done = subprocess.run(command, cwd=FOLDER.parent, check=True, stdout=subprocess.PIPE, text=True)
    title = f"# made from {compute_digest(name)} by `make lock`; do not edit\n"
    (FOLDER / f"{name}.txt").write_text(title + done.stdout)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only check, and write nothing")
    parser.add_argument("--uv", default="uv", help="the program that resolves")
    options = parser.parse_args()
    if options.check:
        stale = find_stale()
        if stale:
            names = ", ".join(f"requirements/{name}.txt" for name in stale)
            print(f"{names}: not of this pyproject.toml; run: make lock", file=sys.stderr)
        return bool(stale)
    for name in LOCKS:
        write(name, options.uv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
