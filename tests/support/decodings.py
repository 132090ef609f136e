"""A party by hand that decodes what it receives, to test the runtime without the partitioner."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec
import numpy as np
from onnx import helper

from splitonnx.bundles import PartyBundle
from splitonnx.manifests import Encoded, Source, Stage, StageInput, WireKind
from splitonnx.messages import TaskKey
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.tensors import TensorSpec
from tests.support import tiny

ENGINE = Engine(threads=1)
KEY = TaskKey("s", "train", 0, 0)


@dataclass(frozen=True)
class Decoding:
    """The tiny server's part, whose h arrives as codes, which a stage decodes to ten times them."""

    server: PartyBundle

    @classmethod
    def make(cls, kind: WireKind = WireKind.ACTIVATION) -> Decoding:
        """Change the tiny server's part; ``kind`` is what h is said to be."""
        bundle = tiny.split_bundle()
        assert bundle.server is not None
        party, manifest = bundle.server, bundle.server.manifest
        phase = manifest.phase("train")
        codes = TensorSpec(name="h#codes", dtype="F32", shape=("N", 4))
        wires = [
            msgspec.structs.replace(w, tensor=codes) if w.tensor.name == "h" else w
            for w in phase.wires
        ]
        stages = [
            msgspec.structs.replace(
                stage,
                inputs=tuple(
                    StageInput(name="h", source=Source.STASH) if i.name == "h" else i
                    for i in stage.inputs
                ),
            )
            for stage in phase.stages
        ]
        inputs = (StageInput(name="h#codes", source=Source.WIRE),)
        decoder = Stage(name="decode", graph="decode.onnx", inputs=inputs, outputs=("h",))
        nodes = [
            helper.make_node("Constant", [], ["ten"], value_float=10.0),
            helper.make_node("Mul", ["h#codes", "ten"], ["h"]),
        ]
        encoded = Encoded(
            tensor=tiny.spec("h"),
            sender="client",
            receiver="server",
            kind=kind,
            codec="tenth",
            wires=("h#codes",),
        )
        changed = msgspec.structs.replace(
            phase, stages=(decoder, *stages), wires=tuple(wires), encoded=(encoded,)
        )
        phases = tuple(changed if p.name == "train" else p for p in manifest.phases)
        return cls(
            replace(
                party,
                manifest=msgspec.structs.replace(manifest, phases=phases),
                graphs={**party.graphs, "decode.onnx": tiny.make_graph(nodes, inputs, ("h",))},
            )
        )

    def run(self, codes: np.ndarray, norm: float | None = None) -> dict[str, np.ndarray]:
        """Take one step, and return what the server sends."""
        executor, labels = Executor(self.server, ENGINE, norm=norm), tiny.batch(0)["labels"]
        executor.begin(KEY, data={}, seed=5, learning_rate=tiny.RATE)
        executor.deliver(KEY, {"h#codes": codes, "labels": labels})
        groups = list(executor.advance(KEY))
        executor.finish(KEY)
        assert executor.step == 1
        return {name: array for group in groups for name, array in group.items()}
