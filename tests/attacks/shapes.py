"""F1 to F3: sizes that native kernels do not survive, or bring another's memory back with."""

from __future__ import annotations

import time

import numpy as np

from splitonnx.messages import Message, Tensors, encode_message
from tests.attacks.models import Cut, build_pictures, build_rows, cut_model, save
from tests.attacks.processes import Server, make_token
from tests.attacks.verdicts import Attack, Ground, Outcome
from tests.attacks.wires import Gone, Line, describe
from tests.support.lying_servers import LyingServer, Word

PLANTED = 777.0
"""The owner's gradient, all over; the attacker sends zeros, and must get zeros or an error."""
SIDE = 32
"""Of a picture whose gradient holds 4,096 values."""
SMALL, LARGE = 8, 2048
HUGE_ROWS = 4_000_000
MANY_MIB = 256.0
"""What a message of some hundred bytes may add to the server's memory at the most."""


def zero_rows(ground: Ground) -> Outcome:
    """Send a forward wire with no row, then its gradient."""
    told: list[str] = []
    with Server(ground.checkout, ground.digits.copy(ground.room()).server) as server:
        with Line(server.url, ground.digits.client) as eve:
            eve.hello()
            (forward,) = eve.names("train", "client", "activation")
            (gradient,) = eve.names("train", "client", "gradient")
            try:
                empty = {forward: np.zeros((0, 24, 8, 8), np.float32)}
                told.append(describe(eve.ask(eve.task(), empty)[0]))
                empty = {gradient: np.zeros((0, 48, 2, 2), np.float32)}
                told.append(describe(eve.ask(eve.task(turn=1), empty)[0]))
            except Gone:
                pass
        death = server.death()
    return Outcome(
        seen=f"server: {death or 'lives'}; answers: {', '.join(told) or 'none'}",
        held=death is None and "Tensors" not in told and bool(told),
    )


def _cut_pictures(ground: Ground) -> Cut:
    folder = ground.room()
    return cut_model(
        ground.checkout, save(build_pictures(), folder), folder, "--at", "r1", "--tail-at", "r2"
    )


def _step(line: Line, step: int, gradient: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Take a step by hand, and give the gradient that comes back; raises Gone at a Fault."""
    (forward,) = line.names("train", "client", "activation")
    (back,) = line.names("train", "client", "gradient")
    waves = np.ones((1, 4, side, side), np.float32)
    for turn, tensors in enumerate(({forward: waves}, {back: gradient})):
        answer, arrays = line.ask(line.task(step=step, turn=turn), tensors)
        if answer["type"] == "Fault":
            raise Gone(answer["code"])
    (array,) = arrays.values()
    return array


def leak(ground: Ground) -> Outcome:
    """Send a gradient of one picture of one pixel where another owner's was planted."""
    cut = _cut_pictures(ground)
    tokens = cut.bundle.parent / "tokens"
    ana, eve = (make_token(ground.checkout, name, tokens) for name in ("ana", "eve"))
    leaked = total = 0
    refusals: list[str] = []
    with Server(ground.checkout, cut.server, ("--token-file", tokens), ("--threads", 1)) as server:
        honest = np.full((1, 4, SIDE, SIDE), PLANTED, np.float32)
        lone = np.zeros((1, 4, 1, 1), np.float32)
        with Line(server.url, cut.client, ana) as victim:
            victim.hello()
            for step in range(5):
                _step(victim, step, honest)
                with Line(server.url, cut.client, eve) as attacker:
                    attacker.hello()
                    try:
                        found = _step(attacker, 0, lone)
                    except Gone as gone:
                        refusals.append(str(gone))
                        if not server.is_alive:
                            break
                        continue
                    total = found.size
                    leaked = max(leaked, int(np.count_nonzero(found)))
        death = server.death(2)
    told = ", ".join(sorted(set(refusals))) or "none"
    return Outcome(
        seen=f"{leaked:,} of {total:,} values came back that are another's; server: "
        f"{death or 'lives'}; refusals: {told}",
        held=death is None and not leaked and len(refusals) == 5,
    )


def huge_gradient(ground: Ground) -> Outcome:
    """Send a gradient of 2,048 x 2,048 pixels for one of 8 x 8."""
    cut = _cut_pictures(ground)
    told = "none"
    with Server(ground.checkout, cut.server, ("--threads", 1)) as server:
        with Line(server.url, cut.client) as eve:
            eve.hello()
            try:
                _step(eve, 0, np.zeros((1, 4, LARGE, LARGE), np.float32), SMALL)
            except Gone as gone:
                told = str(gone)
        death = server.death()
    return Outcome(
        seen=f"server: {death or 'lives'}; answer: {told[:60]}",
        held=death is None and told == "ArrayMismatch",
    )


def lying_server(ground: Ground) -> Outcome:
    """Answer ``splitonnx train`` with gradients of one pixel, and of 2,048 x 2,048."""
    cut = _cut_pictures(ground)
    random = np.random.default_rng(0)
    data = cut.bundle.parent / "data.npz"
    x = random.standard_normal((4, 2, SMALL, SMALL)).astype(np.float32)
    np.savez(data, x=x, labels=random.integers(0, 3, 4))
    seen, held = [], True
    for shape in ((1, 4, 1, 1), (1, 4, LARGE, LARGE)):
        lie = np.zeros(shape, np.float32)

        def tell(
            message: Message, arrays: dict[str, np.ndarray], lie: np.ndarray = lie
        ) -> list[Word] | None:
            if not isinstance(message, Tensors) or message.turn != 1:
                return None
            return [b"".join(encode_message(message, dict.fromkeys(arrays, lie)))]

        with (
            Server(ground.checkout, cut.copy(ground.room()).server) as server,
            LyingServer(server.port) as liar,
        ):
            liar.tell = tell
            client = cut.copy(ground.room()).client
            ended = ground.checkout.run(
                "train", client, "--server", liar.url, "--data", data, "--batch-size", 1,
                "--give-up-after", 10, seconds=60,
            )  # fmt: skip
        name = ended.last_line.removeprefix("splitonnx: ")[:70] if ended.is_refusal else ended.how
        seen.append(f"{'x'.join(map(str, shape))}: {name}")
        held = held and ended.is_refusal
    return Outcome(seen="; ".join(seen), held=held)


def empty_axis(ground: Ground) -> Outcome:
    """Ask for predictions of four million sequences of no element, in some hundred bytes."""
    folder = ground.room()
    cut = cut_model(
        ground.checkout, save(build_rows(), folder), folder, "--at", "r1", "--tail-at", "r2"
    )
    told = "none"
    with Server(ground.checkout, cut.server, ("--threads", 1)) as server:
        before = server.memory_mib()
        with Line(server.url, cut.client) as eve:
            eve.hello()
            (forward,) = eve.names("predict", "client")
            empty = {forward: np.zeros((HUGE_ROWS, 0, 16), np.float32)}
            begun = time.monotonic()
            try:
                told = describe(eve.ask(eve.task(phase="predict"), empty)[0])
            except (Gone, TimeoutError) as gone:
                told = type(gone).__name__
            seconds = time.monotonic() - begun
        grown = server.memory_mib("VmHWM") - before
        death = server.death(1)
    return Outcome(
        seen=f"{grown:+,.0f} MiB in {seconds:.1f} s; server: {death or 'lives'}; answer: {told}",
        held=death is None and told not in ("Tensors", "TimeoutError") and grown < MANY_MIB,
    )


ATTACKS = (
    Attack(
        fault="F1", name="a batch of zero rows", run=zero_rows,
        right="an error; nobody else notices",
    ),
    Attack(
        fault="F2", name="a gradient smaller than its activation", run=leak,
        right="ArrayMismatch, and no value of another owner",
    ),
    Attack(
        fault="F2", name="a gradient larger than its activation", run=huge_gradient,
        right="ArrayMismatch; the server lives",
    ),
    Attack(
        fault="F2", name="both by a lying server to `splitonnx train`", run=lying_server,
        right="an error of one sentence, exit 2",
    ),
    Attack(
        fault="F3", name="an empty axis beside a huge one", run=empty_axis,
        right=f"an error, and less than {MANY_MIB:.0f} MiB",
    ),
)  # fmt: skip
