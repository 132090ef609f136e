"""What must hold of any bytes: one function a reader, which raises where it does not.

A reader answers with what it is for, or with an error from its docstring whose sentence is one
printable line.  What was read is the same after it was written and read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec
import numpy as np
import onnx

from splitonnx.codecs import decode_tensors, encode_tensors
from splitonnx.errors import (
    ArrayMismatch,
    BundleMismatch,
    ForbiddenExternalData,
    ForbiddenGraph,
    FormatError,
    NormTooLarge,
    NotAModel,
    NotFinite,
    RemoteProtocolError,
    SplitonnxError,
    UnsupportedModel,
    ValueOutOfRange,
)
from splitonnx.manifests import BundleManifest, PartyManifest, decode_manifest, encode_manifest
from splitonnx.messages import decode_message, encode_message
from splitonnx.operators import DOMAINS, STANDARD_OPERATORS, TRAINING_OPERATORS
from splitonnx.partitioner.gate import gates as model_gates
from splitonnx.runtime.gate.gates import check_graph
from splitonnx.runtime.wire.protocols import Protocol, State, list_wires
from tests.byte_fuzzing.forgeries import forge_message, forge_tensors
from tests.byte_fuzzing.framings import frame_message, frame_protobuf, frame_tensors

Arrays = Mapping[str, np.ndarray]
_Manifest = TypeVar("_Manifest", PartyManifest, BundleManifest)

MAX_HEADER = 1 << 20
FORGED = b"g"
"""The first byte of inputs whose other bytes are choices."""
_REFUSALS = (
    RemoteProtocolError,
    BundleMismatch,
    ArrayMismatch,
    ValueOutOfRange,
    NotFinite,
    NormTooLarge,
)
_NEVER = (
    onnx.FunctionProto,
    onnx.TrainingInfoProto,
    onnx.SparseTensorProto,
    onnx.TensorAnnotation,
)
_STATES = tuple(State)
LONGEST_SENTENCE = 2000
"""Characters."""


def try_codec(content: bytes) -> None:
    """Tensors and metadata."""
    try:
        tensors, metadata = decode_tensors(_make_tensors(content), max_header=MAX_HEADER)
    except FormatError as error:
        _check_sentence(error)
        return
    again = decode_tensors(b"".join(encode_tensors(tensors, metadata)), max_header=2 * MAX_HEADER)
    assert again[1] == metadata
    _compare(tensors, again[0])


def try_message(content: bytes) -> None:
    """A message and its tensors."""
    try:
        message, tensors = decode_message(_make_message(content, "client"))
    except FormatError as error:
        _check_sentence(error)
        return
    same, arrays = decode_message(b"".join(encode_message(message, tensors)))
    assert same == message
    _compare(tensors, arrays)


def try_protocol(content: bytes) -> None:
    """An exchange of messages: the first byte tells the role and the state."""
    flags = content[0] if content else 0
    role = "server" if flags & 1 else "client"
    protocol = Protocol(read_manifest(role), role, norm=1e6)
    protocol.state = _STATES[(flags >> 1) % len(_STATES)]
    for part in content[1:].split(b"\n\n")[:4]:
        before = protocol.state
        try:
            protocol.receive(_make_message(part, role))
        except _REFUSALS as error:
            _check_sentence(error)
            assert protocol.state == before


def try_manifest(content: bytes) -> None:
    """A party's manifest, or a bundle's."""
    if content[:1] == b"p":
        _try_manifest(content[1:], PartyManifest)
    else:
        _try_manifest(content[1:], BundleManifest)


def _try_manifest(content: bytes, kind: type[_Manifest]) -> None:
    try:
        manifest = decode_manifest(content, kind, "manifest.json")
    except FormatError as error:
        _check_sentence(error)
        return
    assert decode_manifest(encode_manifest(manifest), kind, "manifest.json") == manifest


def try_graph(content: bytes) -> None:
    """A stage's graph, up to ONNX Runtime; what passes, another parser must read likewise."""
    graph = frame_protobuf(content)
    try:
        check_graph("body.step", graph)
    except ForbiddenGraph as error:
        _check_sentence(error)
        return
    model = onnx.ModelProto.FromString(graph)
    for message in _walk(model):
        assert not isinstance(message, _NEVER), message
        if isinstance(message, onnx.TensorProto):
            assert not message.external_data
            assert message.data_location == onnx.TensorProto.DEFAULT
        if isinstance(message, onnx.NodeProto):
            assert message.domain in DOMAINS
            assert message.op_type in STANDARD_OPERATORS | TRAINING_OPERATORS


def _walk(message: Any) -> Iterator[Any]:
    """Yield a message and all that are in it, as protobuf's own parser sees them."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from _walk(inner)


class _PassedError(SplitonnxError):
    """All of our own screens were passed; what comes now is native code."""


def _stop(*_: object) -> None:
    raise _PassedError


def try_model(content: bytes) -> None:
    """A user's model, up to onnx's checker."""
    checker = vars(model_gates)["check_form"]
    setattr(model_gates, "check_form", _stop)  # noqa: B010
    try:
        model_gates.open_model(frame_protobuf(content))
    except (NotAModel, UnsupportedModel, ForbiddenExternalData) as error:
        _check_sentence(error)
    except _PassedError:
        return
    finally:
        setattr(model_gates, "check_form", checker)  # noqa: B010


def _make_tensors(content: bytes) -> bytes:
    return forge_tensors(content[1:]) if content[:1] == FORGED else frame_tensors(content)


def _make_message(content: bytes, role: str) -> bytes:
    """Make bytes that come in at a party."""
    if content[:1] != FORGED:
        return frame_message(content)
    peer = "client" if role == "server" else "server"
    return forge_message(content[1:], read_manifest(role), _read_wires(role), peer)


def _compare(arrays: Arrays, others: Arrays) -> None:
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert array.dtype == others[name].dtype
        assert array.shape == others[name].shape
        assert array.tobytes() == others[name].tobytes()


def _check_sentence(error: SplitonnxError) -> None:
    sentence = str(error)
    assert sentence.isprintable(), ascii(sentence)
    assert len(sentence) <= LONGEST_SENTENCE, sentence[:LONGEST_SENTENCE]


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "codec": try_codec,
    "message": try_message,
    "protocol": try_protocol,
    "manifest": try_manifest,
    "graph": try_graph,
    "model": try_model,
}


@cache
def read_manifest(role: str) -> PartyManifest:
    """Give the manifest of a party of a real bundle; labels and norms travel in it, too."""
    from splitonnx.optimizers import Adam
    from splitonnx.partitioner.partitions import cut
    from tests.support.zoo import ZOO

    bundle = cut(ZOO["chain"].build(), at="act1", optimizer=Adam(lr=0.1, clip_norm=1.0))
    return bundle.parties[role].manifest


@cache
def _read_wires(role: str) -> str:
    return msgspec.json.encode(list_wires(read_manifest(role))).decode()
