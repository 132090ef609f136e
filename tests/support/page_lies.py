"""The lies that a page is told, each with what the page should say of it."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat

import msgspec
import numpy as np
import onnx

from splitonnx.bundles import PartyBundle
from splitonnx.manifests import Role, StateSpec, encode_manifest
from splitonnx.messages import Fault, Message, Saved, Tensors, Unsaved, Welcome, encode_message
from splitonnx.names import TRAIN
from tests.support.lying_servers import HANG_UP, Arrays, Body, Raw, Tell, Word, whole

MIB = 1 << 20
OVERSIZE = 16 * MIB + 1
"""Bytes of a message that the page does not take."""
BEGUN = 3
"""Steps that are made before the lies in mid-training."""
GRADIENT = "/block1/Relu_output_0@server_grad"
"""The wire that the server sends last in a step."""

Greet = Callable[[Welcome], list[Word]]
HttpResponse = Callable[[Tensors, Arrays], list[Word]]


@dataclass(frozen=True, kw_only=True)
class Complaint:
    """What the page says of a lie: its own words, and a pattern of the client's."""

    title: str
    text: str


def write(message: Message, arrays: Arrays | None = None) -> bytes:
    return b"".join(encode_message(message, arrays))


# --- files ----------------------------------------------------------------------------------------


def give_graph(part: PartyBundle, name: str, graph: bytes) -> dict[str, Body]:
    """Give another graph out, and a manifest to match."""
    files = {**part.manifest.files, name: hashlib.sha256(graph).hexdigest()}
    manifest = msgspec.structs.replace(part.manifest, files=files)
    return {
        "/client/manifest.json": whole(encode_manifest(manifest)),
        f"/client/{name}": whole(graph),
    }


HEAD = "head.forward.onnx"
UNREADABLE = "The server sent a model that cannot be read"
BROKEN = "The server sent a model that is not whole"
REFUSED = "The server sent a model that this page refuses to run"


def with_foreign_operators(part: PartyBundle) -> dict[str, Body]:
    model = onnx.load_from_string(part.graphs[HEAD])
    model.graph.node[0].domain = "com.evil"
    model.opset_import.append(onnx.helper.make_opsetid("com.evil", 1))
    return give_graph(part, HEAD, model.SerializeToString())


def with_data_elsewhere(part: PartyBundle) -> dict[str, Body]:
    model = onnx.load_from_string(part.graphs[HEAD])
    outside = onnx.TensorProto(name="w", dims=[1], data_type=1, data_location="EXTERNAL")
    outside.external_data.add(key="location", value="/etc/passwd")
    model.graph.initializer.append(outside)
    return give_graph(part, HEAD, model.SerializeToString())


def cut_short(part: PartyBundle) -> dict[str, Body]:
    return give_graph(part, HEAD, part.graphs[HEAD][:-1])


def that_cannot_run(part: PartyBundle) -> dict[str, Body]:
    model = onnx.load_from_string(part.graphs[HEAD])
    del model.graph.node[0].input[:]
    return give_graph(part, HEAD, model.SerializeToString())


GRAPHS: dict[str, tuple[Callable[[PartyBundle], dict[str, Body]], Complaint]] = {
    "operators of its own": (
        with_foreign_operators,
        Complaint(title=REFUSED, text="com.evil"),
    ),
    "data that lie elsewhere": (
        with_data_elsewhere,
        Complaint(title=REFUSED, text="'w': its data are outside the graph"),
    ),
    "a graph cut short": (
        cut_short,
        Complaint(title=REFUSED, text="stage 'head.forward' is not run"),
    ),
    "a graph that does not run": (
        that_cannot_run,
        Complaint(title="The model does not run here", text="stage 'head.forward' failed"),
    ),
}


def change(part: PartyBundle, before: str, after: str, sum_key: str = '"none": ') -> bytes:
    """Change a manifest, and take its sum out by giving it another key."""
    text = encode_manifest(part.manifest).decode()
    assert before in text
    return text.replace(before, after).replace('"sha256": ', sum_key).encode()


def with_endless_zeros(part: PartyBundle) -> Body:
    """Declare far more state of an optimizer than there are weights."""
    (weight,) = (s.tensor for s in part.manifest.state if s.tensor.name == "head.linear.weight")
    zeros = [
        StateSpec(tensor=msgspec.structs.replace(weight, name=f"m{number}"), role=Role.OPTIMIZER)
        for number in range(20_000)
    ]
    state = tuple(s for s in part.manifest.state if s.role is not Role.OPTIMIZER)
    return whole(encode_manifest(msgspec.structs.replace(part.manifest, state=(*state, *zeros))))


def give_weights(part: PartyBundle, content: bytes) -> dict[str, Body]:
    """Give other weights out, and a manifest to match."""
    manifest = msgspec.structs.replace(part.manifest, weights=hashlib.sha256(content).hexdigest())
    return {
        "/client/manifest.json": whole(encode_manifest(manifest)),
        "/client/weights.safetensors": whole(content),
    }


def with_a_bit_flipped(part: PartyBundle) -> Body:
    content = bytearray(b"".join(part.encode()[1]))
    content[-1] ^= 1
    return whole(bytes(content))


Lie = Callable[[PartyBundle], Body | dict[str, Body]]

FILES: dict[str, tuple[str, Lie, Complaint]] = {
    "a graph that was altered": (
        HEAD,
        lambda part: whole(part.graphs[HEAD] + b"\0"),
        Complaint(title=BROKEN, text=f"{HEAD}: it was altered"),
    ),
    "a manifest without end": (
        "manifest.json",
        lambda _: Body(parts=repeat(bytes(MIB))),
        Complaint(title=BROKEN, text="manifest.json: .*more bytes than the limit of 16777216"),
    ),
    "weights without end": (
        "weights.safetensors",
        lambda _: Body(parts=repeat(bytes(MIB))),
        Complaint(title=BROKEN, text="weights.safetensors: .*more bytes than the limit of 6"),
    ),
    "a manifest that inflates to a thousand times its size": (
        "manifest.json",
        lambda _: Body(parts=[gzip.compress(bytes(32 * MIB))], encoding="gzip"),
        Complaint(title=BROKEN, text="manifest.json: .*more bytes than the limit of 16777216"),
    ),
    "weights that end before they should": (
        "weights.safetensors",
        lambda _: Body(parts=[bytes(8)], length=1000),
        Complaint(title="The server cannot be reached", text="weights.safetensors lost"),
    ),
    "weights that were altered": (
        "weights.safetensors",
        with_a_bit_flipped,
        Complaint(title=BROKEN, text="weights.safetensors: it was altered"),
    ),
    "weights that are none": (
        "weights.safetensors",
        lambda part: give_weights(part, b"\xff" * 64),
        Complaint(title=UNREADABLE, text="weights.safetensors: .*header of 18446744073709551615"),
    ),
    "a manifest that is none": (
        "manifest.json",
        lambda _: whole(b"<html>"),
        Complaint(title=UNREADABLE, text="manifest.json: not a manifest of splitonnx"),
    ),
    "a manifest that was altered": (
        "manifest.json",
        lambda part: whole(change(part, '"party": ', '"Party": "client", "party": ', '"sha256": ')),
        Complaint(title=BROKEN, text="manifest.json: it was altered"),
    ),
    "a manifest of another version": (
        "manifest.json",
        lambda part: whole(change(part, "bundle/1", "bundle/2")),
        Complaint(title=UNREADABLE, text="bundle/2"),
    ),
    "a manifest that wants more memory than a model takes": (
        "manifest.json",
        with_endless_zeros,
        Complaint(title=UNREADABLE, text="no party has a state 'm4'"),
    ),
    "a manifest that names files elsewhere": (
        "manifest.json",
        lambda part: whole(change(part, f'"{HEAD}":', '"../page.js":')),
        Complaint(title=BROKEN, text=HEAD),
    ),
}


# --- messages -------------------------------------------------------------------------------------


def in_greeting(lie: Greet) -> Tell:
    return lambda message, _: lie(message) if isinstance(message, Welcome) else None


def in_step(lie: HttpResponse, step: int = 0) -> Tell:
    """Lie where the last message of a step is due."""

    def tell(message: Message, arrays: Arrays) -> list[Word] | None:
        if isinstance(message, Tensors) and message.phase == TRAIN and GRADIENT in arrays:
            return lie(message, arrays) if message.step == step else None
        return None

    return tell


def another(message: Message, arrays: Arrays | None = None, **fields: object) -> list[Word]:
    return [write(msgspec.structs.replace(message, **fields), arrays)]


def reshaped(message: Tensors, arrays: Arrays, *shape: int) -> list[Word]:
    return [write(message, {**arrays, GRADIENT: np.ones(shape, "f4")})]


RULES = "The server does not keep to the rules"
MISFIT = "The server sent numbers that do not fit"
ANOTHER = "The server has another model now"
TOO_LARGE = "A message is too large"

GREETINGS: dict[str, tuple[Greet, Complaint]] = {
    "text": (
        lambda _: ["welcome"],
        Complaint(title=RULES, text="it sent text"),
    ),
    "bytes that are not a message": (
        lambda _: [bytes(100)],
        Complaint(title=RULES, text="not a well-formed tensor message"),
    ),
    "a header longer than the message": (
        lambda _: [(1 << 20).to_bytes(8, "little") + b"{}"],
        Complaint(title=RULES, text="header of 1048576 bytes is cut short"),
    ),
    "another session": (
        lambda welcome: another(welcome, session="0" * 32),
        Complaint(title=RULES, text="welcomed session '00"),
    ),
    "a step that was never made": (
        lambda welcome: another(welcome, step=7),
        Complaint(title=RULES, text="continue at step 7"),
    ),
    "a wish for the weights": (
        lambda welcome: another(welcome, policy="splitfed-v1", local_steps=1),
        Complaint(title="The server asks for this device's weights", text="'splitfed-v1' joins"),
    ),
    "another bundle": (
        lambda welcome: another(welcome, digest="0" * 64),
        Complaint(title=ANOTHER, text="digest is [0-9a-f]{64} here and 0{64} there"),
    ),
    "other wires": (
        lambda welcome: another(welcome, wires={}),
        Complaint(title=ANOTHER, text="absent there"),
    ),
}

ANSWERS: dict[str, tuple[HttpResponse, Complaint]] = {
    "another shape": (
        lambda message, arrays: reshaped(message, arrays, 32, 24, 8, 9),
        Complaint(title=MISFIT, text=r"Relu\S+ should be F32\[N, 24, 8, 8\].*F32\[32, 24, 8, 9\]"),
    ),
    "another batch's size": (
        lambda message, arrays: reshaped(message, arrays, 31, 24, 8, 8),
        Complaint(title=MISFIT, text=r"where N = 32, but is F32\[31, 24, 8, 8\]"),
    ),
    "numbers that are none": (
        lambda message, arrays: another(message, {GRADIENT: arrays[GRADIENT] * np.nan}),
        Complaint(title="Training came to NaN or infinity", text="nothing was updated with it"),
    ),
    "a tensor more": (
        lambda message, arrays: another(message, {**arrays, "more": np.zeros(1, "f4")}),
        Complaint(title=RULES, text="'more' is not a wire of phase 'train'"),
    ),
    "bytes after the last tensor": (
        lambda message, arrays: [write(message, arrays) + b"\0"],
        Complaint(title=RULES, text="1 bytes follow the last tensor"),
    ),
    "a message out of turn": (
        lambda message, arrays: another(message, arrays, turn=5),
        Complaint(title=RULES, text="message 5 where 1 was due"),
    ),
    "an answer of another step": (
        lambda message, arrays: another(message, arrays, step=9),
        Complaint(title=RULES, text="it answered train 9.0"),
    ),
    "another kind of message": (
        lambda message, _: [write(Saved(session=message.session, step=0))],
        Complaint(title=RULES, text="a Saved while open"),
    ),
    "an error in odd letters": (
        lambda *_: [write(Fault(code="constructor", reason="\u202e\n\x1b[2J<b>" + "x" * 9999))],
        Complaint(title="The server reports an error", text=r"constructor: \?\?\?\[2J<b>x+\.\.\.$"),
    ),
    "one frame that is too large": (
        lambda *_: [bytes(OVERSIZE)],
        Complaint(title=TOO_LARGE, text=f"larger than this side takes .{OVERSIZE} bytes, over"),
    ),
}


# --- in the middle of a training ------------------------------------------------------------------


def in_saving(lie: Callable[[Saved], list[Word]]) -> Tell:
    """Lie where the server should say that it has written its checkpoint."""

    def tell(message: Message, _: Arrays) -> list[Word] | None:
        return lie(message) if isinstance(message, Saved) and message.step == BEGUN + 1 else None

    return tell


def after_a_cut(lie: Greet) -> Tell:
    """Break the connection in mid-training, and lie where it is made again."""
    greetings = 0

    def tell(message: Message, arrays: Arrays) -> Sequence[Word] | None:
        nonlocal greetings
        greetings += isinstance(message, Welcome)
        if isinstance(message, Welcome) and greetings > 1:
            return lie(message)
        return in_step(lambda *_: [HANG_UP], BEGUN)(message, arrays)

    return tell


LATER: dict[str, tuple[Tell, Complaint]] = {
    "a gradient of another shape": (
        in_step(lambda message, arrays: reshaped(message, arrays, 32, 24, 8, 9), BEGUN),
        Complaint(title=MISFIT, text=r"F32\[32, 24, 8, 9\]"),
    ),
    "fragments that are too many": (
        in_step(lambda *_: [[*repeat(bytes(MIB), OVERSIZE // MIB), b"\0"]], BEGUN),
        Complaint(title=TOO_LARGE, text="over the limit of"),
    ),
    "that it saved another step": (
        in_saving(lambda saved: another(saved, step=9)),
        Complaint(title=RULES, text="it saved step 9, not 4"),
    ),
    "that it saved nothing": (
        in_saving(lambda saved: [write(Unsaved(session=saved.session, step=4, reason="no\nway"))]),
        Complaint(title="The training cannot be saved", text=r"server's folder.*no\?way"),
    ),
    "that it goes on where nobody can": (
        after_a_cut(lambda welcome: another(welcome, step=1)),
        Complaint(title=RULES, text="continue at step 1"),
    ),
    "that it has forgotten all": (
        after_a_cut(lambda _: [write(Fault(code="SessionLost", reason="never heard of it"))]),
        Complaint(title="The server has forgotten this training", text="never heard of it"),
    ),
}

NO_FRAME = in_step(lambda *_: [Raw(b"\x82\x7f" + b"\xff" * 8)], BEGUN)
"""It announces what no memory holds: the browser ends the connection, and tells nobody why."""
