"""A tiny model, cut by hand, to test the runtime without the partitioner.

    a = x @ W1; h = relu(a)         client; x (N, 3), W1 (3, 4)
    y = h @ W2                      server; W2 (4, 2)
    loss = mean((y - labels)^2)     labels (N, 2)

trained by SGD with momentum 0.9.  Stages are of standard operators only; ``reference_step`` is
the same arithmetic in numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import msgspec
import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.manifests import (
    FORMAT,
    KEY,
    LEARNING_RATE,
    STEP,
    BundleManifest,
    PartyManifest,
    Phase,
    Role,
    Source,
    Stage,
    StageInput,
    StateSpec,
    Wire,
    WireKind,
)
from splitonnx.recipes import Recipe
from splitonnx.sharing import declare_sharing
from splitonnx.tensors import TensorSpec, name_dtype

SHAPES: Mapping[str, tuple[int | str, ...]] = {
    "x": ("N", 3),
    "labels": ("N", 2),
    "h": ("N", 4),
    "h.grad": ("N", 4),
    "y": ("N", 2),
    "loss": (),
}
WEIGHTS: Mapping[str, np.ndarray] = {
    "W1": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "W2": np.linspace(1, -0.5, 8, dtype=np.float32).reshape(4, 2),
}
RATE = 0.1


def spec(name: str) -> TensorSpec:
    return TensorSpec(name=name, dtype="F32", shape=SHAPES[name])


def batch(seed: int, size: int = 6) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "x": generator.standard_normal((size, 3)).astype(np.float32),
        "labels": generator.standard_normal((size, 2)).astype(np.float32),
    }


def reference_step(
    state: dict[str, np.ndarray], data: Mapping[str, np.ndarray], rate: float = RATE
) -> float:
    """Take one step in place, in float64; return the loss before it."""
    a = data["x"] @ state["W1"]
    h = np.maximum(a, 0)
    difference = h @ state["W2"] - data["labels"]
    y_grad = 2 * difference / difference.size
    grads = {
        "W1": data["x"].T @ (y_grad @ state["W2"].T * (a > 0)),
        "W2": h.T @ y_grad,
    }
    for name, grad in grads.items():
        state[f"{name}.m"] = 0.9 * state.get(f"{name}.m", 0) + grad
        state[name] = state[name] - rate * state[f"{name}.m"]
    return float(np.mean(difference**2))


def reference_state() -> dict[str, np.ndarray]:
    return {name: weight.astype(np.float64) for name, weight in WEIGHTS.items()}


def reference_predict(state: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(x @ state["W1"], 0) @ state["W2"])


def make_graph(
    nodes: list[NodeProto], inputs: tuple[StageInput, ...], outputs: tuple[str, ...]
) -> bytes:
    """Serialize a stage graph whose inputs are float but for the runtime's integer scalars."""
    types = {KEY: TensorProto.INT64, STEP: TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "stage",
        [
            helper.make_tensor_value_info(i.name, types.get(i.name, TensorProto.FLOAT), None)
            for i in inputs
        ],
        [ValueInfoProto(name=name) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def make_party(
    name: str,
    phases: tuple[Phase, ...],
    nodes: Mapping[str, list[NodeProto]],
    weights: Mapping[str, np.ndarray],
) -> PartyBundle:
    """Put a party together; every stage's graph is made of the nodes under the stage's name."""
    graphs = {
        stage.graph: make_graph(nodes[stage.name], stage.inputs, stage.outputs)
        for phase in phases
        for stage in phase.stages
    }
    state = [
        StateSpec(
            tensor=TensorSpec(name=key, dtype=name_dtype(array.dtype), shape=array.shape), role=role
        )
        for weight, array in weights.items()
        for key, role in ((weight, Role.PARAMETER), (f"{weight}.m", Role.OPTIMIZER))
    ]
    manifest = PartyManifest(
        format=FORMAT,
        party=name,
        digest="d1" * 32,
        target="portable",
        phases=phases,
        state=tuple(state),
        files={file: hashlib.sha256(graph).hexdigest() for file, graph in graphs.items()},
        learning_rate=RATE,
        outputs=(spec("y"),),
    )
    return PartyBundle(manifest=manifest, graphs=graphs, weights=weights)


def make_stage(name: str, inputs: Mapping[str, Source], outputs: tuple[str, ...]) -> Stage:
    return Stage(
        name=name,
        graph=f"{name}.onnx",
        inputs=tuple(StageInput(name=key, source=source) for key, source in inputs.items()),
        outputs=outputs,
    )


def make_wire(name: str, sender: str, kind: WireKind = WireKind.ACTIVATION) -> Wire:
    """Declare a single number that travels."""
    receiver = "client" if sender == "server" else "server"
    tensor = TensorSpec(name=name, dtype="F32", shape=())
    return Wire(tensor=tensor, sender=sender, receiver=receiver, kind=kind)


def split_bundle() -> Bundle:
    """The vanilla cut: the server holds the last layer and the loss and is sent the labels."""
    return _bundle({"client": _client(), "server": _server()})


def sharing_bundle() -> Bundle:
    """The vanilla cut, whose parties can share their weights as those that are cut can."""
    parties = {"client": _client(), "server": _server()}
    manifests = declare_sharing({name: party.manifest for name, party in parties.items()}, [])
    return _bundle({n: replace(party, manifest=manifests[n]) for n, party in parties.items()})


def local_bundle() -> Bundle:
    """The same model left whole, all of it with the client."""
    return _bundle({"client": _whole()})


def fixed_bundle() -> PartyBundle:
    """The client of the whole model, with a batch that is fixed at 8 rows."""
    bundle = local_bundle().client
    phases = tuple(
        msgspec.structs.replace(
            phase,
            data=tuple(msgspec.structs.replace(s, shape=(8, *s.shape[1:])) for s in phase.data),
        )
        for phase in bundle.manifest.phases
    )
    return replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, phases=phases))


def _bundle(parties: Mapping[str, PartyBundle]) -> Bundle:
    recipe = Recipe(at=("h",), tail_at=(), loss="mse", output="y", optimizer={"name": "sgd"})
    manifest = BundleManifest(
        format=FORMAT, digest="d1" * 32, recipe=recipe, parties=tuple(parties)
    )
    return Bundle(manifest=manifest, parties=parties, skeleton=b"no model")


def _wire(name: str, sender: str, kind: WireKind) -> Wire:
    receiver = "client" if sender == "server" else "server"
    return Wire(tensor=spec(name), sender=sender, receiver=receiver, kind=kind)


TRAIN_WIRES = (
    _wire("h", "client", WireKind.ACTIVATION),
    _wire("labels", "client", WireKind.INPUT),
    _wire("h.grad", "server", WireKind.GRADIENT),
    _wire("loss", "server", WireKind.REPORT),
)
PREDICT_WIRES = (
    _wire("h", "client", WireKind.ACTIVATION),
    _wire("y", "server", WireKind.OUTPUT),
)

_node = helper.make_node
_FORWARD = [_node("MatMul", ["x", "W1"], ["a"]), _node("Relu", ["a"], ["h"])]
_PREDICT = [_node("MatMul", ["h", "W2"], ["y"])]
_LOSS = [
    _node("Sub", ["y", "labels"], ["difference"]),
    _node("Mul", ["difference", "difference"], ["square"]),
    _node("ReduceMean", ["square"], ["loss"], keepdims=0),
]
_SERVER_BACKWARD = [
    _node("Size", ["difference"], ["size"]),
    _node("Cast", ["size"], ["count"], to=TensorProto.FLOAT),
    _node("Add", ["difference", "difference"], ["double"]),
    _node("Div", ["double", "count"], ["y.grad"]),
    _node("Transpose", ["W2"], ["W2.t"], perm=[1, 0]),
    _node("MatMul", ["y.grad", "W2.t"], ["h.grad"]),
    _node("Transpose", ["h"], ["h.t"], perm=[1, 0]),
    _node("MatMul", ["h.t", "y.grad"], ["W2.grad"]),
]
_CLIENT_BACKWARD = [
    _node("Sign", ["h"], ["active"]),
    _node("Mul", ["h.grad", "active"], ["a.grad"]),
    _node("Transpose", ["x"], ["x.t"], perm=[1, 0]),
    _node("MatMul", ["x.t", "a.grad"], ["W1.grad"]),
]
_EVALUATE = [
    *_LOSS,
    _node("Abs", ["difference"], ["distance"]),
    _node("ReduceMean", ["distance"], ["mae"], keepdims=0),
]
EVALUATE = Phase(
    name="evaluate",
    data=(spec("y"), spec("labels")),
    stages=(make_stage("evaluate", {"y": Source.DATA, "labels": Source.DATA}, ("loss", "mae")),),
    results=("loss", "mae"),
)


def _update(weight: str) -> list[NodeProto]:
    return [
        _node("Constant", [], [f"{weight}.0.9"], value_float=0.9),
        _node("Mul", [f"{weight}.m", f"{weight}.0.9"], [f"{weight}.decayed"]),
        _node("Add", [f"{weight}.decayed", f"{weight}.grad"], [f"{weight}.m.new"]),
        _node("Mul", [f"{weight}.m.new", LEARNING_RATE], [f"{weight}.change"]),
        _node("Sub", [weight, f"{weight}.change"], [f"{weight}.new"]),
    ]


def _update_stage(name: str, weight: str) -> Stage:
    inputs = {
        weight: Source.STATE,
        f"{weight}.m": Source.STATE,
        f"{weight}.grad": Source.STASH,
        LEARNING_RATE: Source.SCALAR,
    }
    return make_stage(name, inputs, (f"{weight}.new", f"{weight}.m.new"))


def _commits(*weights: str) -> dict[str, str]:
    names = [name for weight in weights for name in (weight, f"{weight}.m")]
    return {name: f"{name}.new" for name in names}


def _client() -> PartyBundle:
    forward = {"x": Source.DATA, "W1": Source.STATE}
    backward = {"h.grad": Source.WIRE, "h": Source.STASH, "x": Source.DATA}
    train = Phase(
        name="train",
        data=(spec("x"), spec("labels")),
        stages=(
            make_stage("head.forward", forward, ("h",)),
            make_stage("head.backward", backward, ("W1.grad",)),
            _update_stage("head.update", "W1"),
        ),
        wires=TRAIN_WIRES,
        results=("loss",),
        commits=_commits("W1"),
    )
    predict = Phase(
        name="predict",
        data=(spec("x"),),
        stages=(make_stage("head.predict", forward, ("h",)),),
        wires=PREDICT_WIRES,
        results=("y",),
    )
    nodes = {
        "head.forward": _FORWARD,
        "head.backward": _CLIENT_BACKWARD,
        "head.update": _update("W1"),
        "head.predict": _FORWARD,
        "evaluate": _EVALUATE,
    }
    return make_party("client", (train, predict, EVALUATE), nodes, {"W1": WEIGHTS["W1"]})


def _server() -> PartyBundle:
    step = {"h": Source.WIRE, "labels": Source.WIRE, "W2": Source.STATE}
    train = Phase(
        name="train",
        stages=(
            make_stage("body.step", step, ("loss", "h.grad", "W2.grad")),
            _update_stage("body.update", "W2"),
        ),
        wires=TRAIN_WIRES,
        commits=_commits("W2"),
    )
    predict = Phase(
        name="predict",
        stages=(make_stage("body.predict", {"h": Source.WIRE, "W2": Source.STATE}, ("y",)),),
        wires=PREDICT_WIRES,
    )
    nodes = {
        "body.step": [*_PREDICT, *_LOSS, *_SERVER_BACKWARD],
        "body.update": _update("W2"),
        "body.predict": _PREDICT,
    }
    return make_party("server", (train, predict), nodes, {"W2": WEIGHTS["W2"]})


def _whole() -> PartyBundle:
    weights = {"W1": Source.STATE, "W2": Source.STATE}
    step = {"x": Source.DATA, "labels": Source.DATA, **weights}
    train = Phase(
        name="train",
        data=(spec("x"), spec("labels")),
        stages=(
            make_stage("model.step", step, ("loss", "W1.grad", "W2.grad")),
            _update_stage("head.update", "W1"),
            _update_stage("body.update", "W2"),
        ),
        results=("loss",),
        commits=_commits("W1", "W2"),
    )
    predict = Phase(
        name="predict",
        data=(spec("x"),),
        stages=(make_stage("model.predict", {"x": Source.DATA, **weights}, ("y",)),),
        results=("y",),
    )
    nodes = {
        "model.step": [*_FORWARD, *_PREDICT, *_LOSS, *_SERVER_BACKWARD, *_CLIENT_BACKWARD],
        "head.update": _update("W1"),
        "body.update": _update("W2"),
        "model.predict": [*_FORWARD, *_PREDICT],
        "evaluate": _EVALUATE,
    }
    return make_party("client", (train, predict, EVALUATE), nodes, WEIGHTS)
