"""``python -m tests.byte_fuzzing [TARGET...]``: fuzz everything that reads bytes, with atheris.

Two targets run at a time, each in a process of its own.  A finding's input is kept in
``fuzz-findings`` and ends its target; ``python -m tests.byte_fuzzing TARGET --input FILE`` tries it
again.  What the targets are and must hold stands in ``targets``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.byte_fuzzing.corpora import list_inputs, list_words
from tests.byte_fuzzing.targets import TARGETS

LONGEST_INPUT = 2048
"""Bytes; a message with all wires of a small network fits."""
SLOWEST_INPUT = 10
"""Seconds; an input that takes longer is a finding."""
MEMORY = 2048
"""Megabytes of a process; one that takes more is a finding."""

_DONE = re.compile(r"^Done (\d+) runs in (\d+) second", re.MULTILINE)


def main() -> int:
    """Fuzz the targets; 1 where there was a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.byte_fuzzing", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--runs", type=int, help="inputs a target, however long it takes")
    parser.add_argument("--seconds", type=int, default=300, help="time a target, without --runs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--input", type=Path, help="try this input alone, in this process")
    options = parser.parse_args()
    if unknown := set(options.targets) - TARGETS.keys():
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if options.input is not None:
        for target in options.targets:
            TARGETS[target](options.input.read_bytes())
        return 0
    length = ["-runs=-1", f"-max_total_time={options.seconds}"]
    if options.runs is not None:
        length = [f"-runs={options.runs}"]
    options.folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(max_workers=2) as pool:
        done = pool.map(
            lambda target: fuzz(target, [*length, f"-seed={options.seed}"], options.folder),
            options.targets or TARGETS,
        )
        return 0 if all(done) else 1


def fuzz(target: str, length: Sequence[str], folder: Path) -> bool:
    """Fuzz one target, print what libFuzzer counted, and say whether there was no finding."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus, words = Path(scratch, "corpus"), Path(scratch, "words")
        corpus.mkdir()
        for number, content in enumerate(list_inputs(target)):
            (corpus / str(number)).write_bytes(content)
        words.write_text("".join(f'"{_escape(word)}"\n' for word in list_words(target)))
        command = [
            sys.executable, "-m", "tests.byte_fuzzing.harnesses", target, *length,
            f"-max_len={LONGEST_INPUT}", f"-timeout={SLOWEST_INPUT}", f"-rss_limit_mb={MEMORY}",
            f"-dict={words}", f"-artifact_prefix={folder}/{target}-", str(corpus),
        ]  # fmt: skip
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - started
    counted = _DONE.search(done.stderr)
    if done.returncode or counted is None:
        print(f"{target}: a finding\n{done.stdout[-4000:]}{done.stderr[-4000:]}", flush=True)
        return False
    runs = int(counted[1])
    print(f"{target}: {runs} inputs in {seconds:.0f} s, {runs / seconds:.0f} a second", flush=True)
    return True


def _escape(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    sys.exit(main())
