"""Weak points of what is written: a writer that is killed, and a disk that is slow."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

from tests.attacks.processes import Server
from tests.attacks.sessions import train
from tests.attacks.verdicts import Attack, Ground, Outcome
from tests.attacks.wires import Line, describe

HERE = Path(__file__).parent
MOST_KILLS = 20
WAYS = ("exchange", "renames")
DISK_SECONDS = 10.0
"""Within which another's greeting has to be answered while the disk is held."""


def killed_replacement(ground: Ground) -> Outcome:
    """Kill ``cut --force`` before each rename and removal; another command then reads the folder.

    The manifest tells which of the two it is: the new one is cut at one place, the old one at two.
    """
    seen, kills, went = [], 0, 0
    modules = (ground.checkout.root / "splitonnx" / f"{name}.py" for name in ("atomic", "folders"))
    exchanges = any(module.exists() for module in modules)
    for way in WAYS if exchanges else WAYS[:1]:
        for number in itertools.count(1):
            folder = ground.room()
            old = ground.digits.copy(folder).bundle
            before = (old / "manifest.json").read_bytes()
            model = ground.checkout.root / "examples" / "digits.onnx"
            ended = ground.checkout.run(
                "cut", model, "--at", "/block1/Relu_output_0", "--send-labels", "--force",
                "-o", old,
                through=(HERE / "killed.py", old, number, way),
            )  # fmt: skip
            is_killed = ended.code == -signal.SIGKILL
            if not is_killed and ended.code != 0:
                raise RuntimeError(f"cut --force: {ended.how}: {ended.printed}")
            read = ground.checkout.run("merge", old, "-o", folder / "merged.onnx")
            if read.code != 0:
                seen.append("nothing")
            else:
                is_old = (old / "manifest.json").read_bytes() == before
                seen.append("old" if is_old else "new")
            kills += is_killed
            went += not is_killed
            if not is_killed or number == MOST_KILLS:
                break
    counts = {kind: seen.count(kind) for kind in ("old", "new", "nothing")}
    told = ", ".join(f"{count} times {kind}" for kind, count in counts.items())
    return Outcome(
        seen=f"{kills} kills, {went} went through: {told} in place",
        held=kills > 1 and counts["nothing"] == 0 and min(counts["old"], counts["new"]) > 0,
    )


def slow_disk(ground: Ground) -> Outcome:
    """Hold the disk while a session is unloaded for a newcomer; another one, in memory, comes back.

    A disk is held by a file beside the folder: syncing waits until it is gone.
    """
    cut = ground.digits.copy(ground.room())
    held = cut.bundle.parent / "held"
    through = (HERE / "slow_disk.py", held)
    with Server(ground.checkout, cut.server, ("--max-sessions", 2), through=through) as server:
        with Line(server.url, cut.client) as first:
            first.hello()
            train(first, 2)
        with Line(server.url, cut.client) as second:
            second.hello()
            train(second, 2)
            held.touch()
            with Line(server.url, cut.client) as newcomer:
                newcomer.send(newcomer.greeting())
                server.wait_for("the disk is waited for")
                with Line(server.url, cut.client) as again:
                    again.session = second.session
                    try:
                        answer = again.ask(
                            again.greeting(step=2, kept=[2], generation=2), patience=DISK_SECONDS
                        )
                        told = describe(answer[0])
                    except TimeoutError:
                        told = f"nothing within {DISK_SECONDS:.0f} s"
                    held.unlink()
                late = describe(newcomer.receive()[0])
    return Outcome(
        seen=f"one in memory, while another is unloaded: {told}; the newcomer, afterwards: {late}",
        held=told == late == "Welcome",
    )


ATTACKS = (
    Attack(
        fault="W", name="cut --force is killed at a rename", run=killed_replacement,
        right="the old bundle or the new one is in place",
    ),
    Attack(
        fault="W", name="greetings while a disk is slow", run=slow_disk,
        right="another's session is greeted meanwhile",
    ),
)  # fmt: skip
