"""Random messages, well-formed but wrong, against a server while an honest client trains in it.

Two attackers with tokens of their own have two lines each, and reconnect, take each other's
sessions over and name them as theirs.  Every message gets an answer that the protocol knows, or
the end of its connection.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from websockets.exceptions import WebSocketException

from splitonnx import Bundle, Client, errors
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from tests.attacks import honest
from tests.attacks.models import Cut, build_pictures, cut_model, save
from tests.attacks.processes import MIB, Server, make_token
from tests.attacks.strategies import OTHERS, Dice, Sent, draw_change, draw_rounds
from tests.attacks.verdicts import Attack, Ground, Outcome
from tests.attacks.wires import Gone, Line, describe

OWNERS = ("ana", "eve", "max")
"""The first is honest."""
LINES = 4
MESSAGES = 50
"""Of an example."""
TASK_MIB, MESSAGE_MIB = 128, 4
"""Limits of the server: of tasks that run at a time, and of one message."""
STATES_MIB, READ_MIB = 32, 16
"""What the server's 32 sessions hold at most with a model of this size, and what it reads ahead of
a connection."""
BOUND_MIB = TASK_MIB + STATES_MIB + (LINES + 1) * (MESSAGE_MIB + READ_MIB)
"""What the server's memory may grow by, by its limits."""
SLOWER = 4.0
"""Times its median that the honest client's slowest step may take."""
PROBE = {"type": "Bye"}
"""What is always answered, by the end of the connection."""
ANSWERS = ("Welcome", "Tensors", "Saved", "Unsaved", "Fault")


@dataclass(kw_only=True)
class Seat:
    """A connection, and where an honest client would be there.

    ``forwards`` are the wires by which a client begins a task, and ``shape`` is the last one's that
    the server took.
    """

    line: Line
    owner: int
    forwards: frozenset[str]
    greeted: bool = False
    step: int = 0
    turn: int = 0
    shape: tuple[int, ...] = (1, 4, 4, 4)


@dataclass(kw_only=True)
class Seen:
    """What the attackers saw so far."""

    messages: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    last: deque[str] = field(default_factory=lambda: deque(maxlen=12))


class Battle:
    """A server, an honest client in a process of its own, and the attackers' lines."""

    def __init__(self, ground: Ground) -> None:
        folder = ground.room()
        self.seen = Seen()
        self.cut = cut_model(
            ground.checkout, save(build_pictures(), folder), folder, "--at", "r1", "--tail-at", "r2"
        )
        tokens = folder / "tokens"
        self._tokens = [make_token(ground.checkout, name, tokens) for name in OWNERS]
        self.server = Server(
            ground.checkout, self.cut.server, ("--token-file", tokens), ("--threads", 1),
            ("--max-message-bytes", MESSAGE_MIB * MIB), ("--max-task-bytes", TASK_MIB * MIB),
        )  # fmt: skip
        self._folder = folder
        self._seats: list[Seat | None] = [None] * LINES
        self._sessions: dict[str, int] = {}
        """Whose each session is, by the number of its token."""
        self._generations: Counter[str] = Counter()
        self._steps: Counter[str] = Counter()
        self._honest = subprocess.Popen(
            [sys.executable, "-P", honest.__file__, folder, self.server.url, self._tokens[0]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ground.checkout.environment,
        )
        self.before = 0.0
        """MiB of the server's memory before the first message."""

    def __enter__(self) -> Battle:
        assert self._honest.stdout is not None
        try:
            assert self._honest.stdout.readline() == "begun\n"
            self._warm_up()
        except BaseException:
            self.close()
            raise
        self.before = self.server.memory_mib()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server, and the honest client with it."""
        self.end_lines()
        self.server.kill()
        self._honest.kill()
        self._honest.communicate()

    def end_lines(self) -> None:
        """Hang up everywhere."""
        for seat in self._seats:
            if seat is not None:
                seat.line.close()
        self._seats = [None] * LINES

    def finish(self) -> tuple[np.ndarray, int]:
        """Let the honest client end; give its steps' seconds and how many weights differ."""
        self._honest.communicate("", timeout=60)
        assert self._honest.returncode == 0
        with np.load(self._folder / "honest.npz") as found:
            seconds, weights = found["seconds"], dict(found)
        differing = 0
        for name, array in train_undisturbed(self.cut, len(seconds)).items():
            differing += not np.array_equal(array, weights[f"weight {name}"])
        return seconds, differing

    def move(self, dice: Dice) -> None:
        """Send one message on one of the lines, and see what comes."""
        place = dice.choose(range(LINES))
        seat = self._seats[place] or self._open(place)
        if seat is None:
            return
        self._seats[place] = seat
        sent = self._draw_message(dice, seat)
        changes = (0, 0, 0, 1) if sent.facts["type"] == "Hello" else (0, 0, 1, 1, 2)
        for _ in range(dice.choose(changes)):
            sent = draw_change(dice, sent, list(self._sessions)[-8:])
        self.seen.messages += 1
        self.seen.last.append(f"line {place}: {sent}")
        if not self._say(seat, sent):
            seat.line.close()
            self._seats[place] = None

    def check(self) -> None:
        """Raise unless the server and the honest client are well."""
        last = "\n".join(self.seen.last)
        assert self.server.is_alive, f"the server ended: {self.server.death()} after\n{last}"
        assert self._honest.poll() is None, f"the honest client ended after\n{last}"

    def _warm_up(self) -> None:
        """Let each attacker make a step, so that what it needs at all is there."""
        for token in self._tokens[1:]:
            with Line(self.server.url, self.cut.client, token) as line:
                line.hello()
                for turn, kind in enumerate(("activation", "gradient")):
                    (name,) = line.names("train", "client", kind)
                    line.ask(line.task(turn=turn), {name: np.ones((1, 4, 4, 4), np.float32)})
                line.leave()

    def _open(self, place: int) -> Seat | None:
        owner = 1 + place // 2
        try:
            line = Line(self.server.url, self.cut.client, self._tokens[owner])
        except (WebSocketException, OSError) as error:
            self.check()
            self.seen.answers[type(error).__name__] += 1
            return None
        forwards = line.names("train", "client", "activation")
        return Seat(line=line, owner=owner, forwards=frozenset(forwards))

    def _draw_message(self, dice: Dice, seat: Seat) -> Sent:
        """Draw what an honest client could say now, and now and then something else."""
        line = seat.line
        if dice.once_in(12):
            return Sent(facts=dict(dice.choose(OTHERS)))
        if not seat.greeted or dice.once_in(16):
            return self._draw_hello(dice, seat)
        kind = dice.choose(("train",) * 6 + ("predict", "save"))
        if kind == "save":
            publish = dice.once_in(2)
            facts = {"type": "Save", "session": line.session, "step": seat.step, "publish": publish}
            return Sent(facts=facts)
        if kind == "train" and seat.turn == 1:
            (name,) = line.names("train", "client", "gradient")
            task, shape = line.task(step=seat.step, turn=1), seat.shape
        else:
            side = dice.choose((1, 2, 4, 6))
            shape = (dice.choose((1, 2, 3)), 4, side, side)
            (name,) = line.names(kind, "client", "activation")
            task = line.task(phase=kind, step=seat.step)
        return Sent(facts=task, tensors={name: np.ones(shape, np.float32)})

    def _draw_hello(self, dice: Dice, seat: Seat) -> Sent:
        line = seat.line
        own = [name for name, owner in self._sessions.items() if owner == seat.owner]
        new = f"{len(self._generations) + 1:032x}"
        line.session = dice.choose([new, new, *own[-2:]])
        self._generations[line.session] += 1
        facts = {
            "type": "Hello",
            "digest": line.manifest["digest"],
            "session": line.session,
            "origin": "",
            "start": 0,
            "generation": self._generations[line.session],
            "step": self._steps[line.session],
            "kept": dice.choose(([], [], [], [0], [1, 2])),
            "is_open": dice.once_in(2),
            "can_repeat": dice.once_in(2),
            "wires": line.wires,
        }
        return Sent(facts=facts)

    def _say(self, seat: Seat, sent: Sent) -> bool:
        """Send a message and take its answers; whether the connection goes on."""
        try:
            seat.line.send(sent.facts, sent.tensors)
            if _is_silent(seat, sent):
                return True
            if _may_be_silent(seat, sent):
                seat.line.send(PROBE)
                while self._take_answer(seat, sent):
                    continue
                return False
            return self._take_answer(seat, sent)
        except Gone:
            self.check()
            self.seen.answers["closed"] += 1
            return False
        except TimeoutError:
            self.check()
            raise AssertionError(f"no answer to {sent}") from None

    def _take_answer(self, seat: Seat, sent: Sent) -> bool:
        """Take one answer; whether the connection goes on."""
        answer, arrays = seat.line.receive()
        told = describe(answer)
        self.seen.answers[told] += 1
        assert answer["type"] in ANSWERS, answer
        if answer["type"] == "Fault":
            known = getattr(errors, told, None)
            assert known is not None, answer
            assert issubclass(known, errors.SplitonnxError), answer
            return False
        self._follow(seat, sent, answer)
        for array in arrays.values():
            assert array.size, f"{answer} of nothing, for {sent}"
        return True

    def _follow(self, seat: Seat, sent: Sent, answer: dict[str, object]) -> None:
        """Note where the session is now."""
        if answer["type"] == "Welcome":
            seat.greeted, seat.turn = True, 0
            seat.step = self._steps[str(answer["session"])] = int(str(answer["step"]))
            seat.line.session = str(answer["session"])
            if seat.line.session not in self._sessions:
                self._sessions[seat.line.session] = seat.owner
        elif answer["type"] == "Tensors" and sent.facts["phase"] == "train":
            seat.turn = (int(sent.facts["turn"]) + 1) % 2
            if taken := sent.tensors.keys() & seat.forwards:
                seat.shape = sent.tensors[taken.pop()].shape
            if seat.turn == 0:
                seat.step = self._steps[seat.line.session] = int(sent.facts["step"]) + 1


def _is_silent(seat: Seat, sent: Sent) -> bool:
    """Whether there is nothing to answer: no tensor came for any stage, or a token once more."""
    kind = sent.facts["type"]
    return (kind == "Tensors" and not sent.tensors) or (kind == "Login" and not seat.greeted)


def _may_be_silent(seat: Seat, sent: Sent) -> bool:
    """Whether the server may have to wait for more: what begins a task is not there."""
    if sent.facts["type"] != "Tensors" or sent.tensors.keys() & seat.forwards:
        return False
    return sent.is_changed


def train_undisturbed(cut: Cut, steps: int) -> dict[str, np.ndarray]:
    """Train as many steps with nobody else there."""
    bundle = Bundle.load(cut.bundle)
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(1)))
    with Client(bundle.client, link, threads=1) as client:
        for step in range(steps):
            client.step(honest.make_batch(step))
        return dict(client.state())


def send_messages(
    battle: Battle, count: int, number: int | None, *, derandomize: bool = False
) -> None:
    """Send so many random messages, drawn from the seed ``number``."""

    def play(drawn: list[bytes]) -> None:
        battle.end_lines()
        for one in drawn:
            if battle.seen.messages < count:
                battle.move(Dice(one))
        battle.check()

    while battle.seen.messages < count:
        examples = -(-(count - battle.seen.messages) // MESSAGES)
        limited = settings(
            max_examples=max(1, examples),
            derandomize=derandomize,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        wrapped: Callable[[], None] = limited(given(draw_rounds(MESSAGES))(play))
        if number is not None:
            wrapped = seed(number + battle.seen.messages)(wrapped)
        wrapped()


def random_messages(count: int, number: int | None, ground: Ground) -> Outcome:
    """Send them all, and look at the memory, the weights and the honest client's steps."""
    number = secrets.randbelow(10**6) if number is None else number
    with Battle(ground) as battle:
        send_messages(battle, count, number)
        battle.end_lines()
        battle.check()
        grown = battle.server.memory_mib("VmHWM") - battle.before
        seconds, differing = battle.finish()
        tracebacks = battle.server.log.count("Traceback")
    median, slowest = float(np.median(seconds[1:])), float(seconds[1:].max())
    kinds = battle.seen.answers
    told = ", ".join(f"{name} {times:,}" for name, times in kinds.most_common(6))
    return Outcome(
        seen=f"seed {number}: {battle.seen.messages:,} messages; {grown:+.0f} MiB; "
        f"{tracebacks} tracebacks; the honest client: {len(seconds):,} steps, {differing} tensors "
        f"differ, median {median * 1e3:.0f} ms, slowest {slowest * 1e3:.0f} ms "
        f"({slowest / median:.1f} times); answers: {told}",
        held=not differing and not tracebacks and grown <= BOUND_MIB and slowest <= SLOWER * median,
    )


def make_attack(count: int, number: int | None) -> Attack:
    """Make the row of the table."""
    return Attack(
        fault="R",
        name=f"{count:,} random messages, well-formed but wrong",
        right=f"at most {BOUND_MIB} MiB more; an honest client's weights bit-equal, no step over "
        f"{SLOWER:.0f} times its median",
        run=partial(random_messages, count, number),
    )
