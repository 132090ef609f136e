"""One target under atheris: ``python -m tests.byte_fuzzing.harnesses TARGET OPTION...``.

The options are libFuzzer's.  Only the modules that read bytes are instrumented: what atheris counts
elsewhere costs time and leads nowhere.
"""

from __future__ import annotations

import sys

import atheris

READERS = [
    "splitonnx.codecs",
    "splitonnx.manifests",
    "splitonnx.messages",
    "splitonnx.tensors",
    "splitonnx.runtime.gate.gates",
    "splitonnx.runtime.gate.protobufs",
    "splitonnx.runtime.wire.protocols",
    "splitonnx.partitioner.gate",
]


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    target, *options = sys.argv[1:]
    with atheris.instrument_imports(include=READERS):
        from tests.byte_fuzzing.targets import TARGETS
    atheris.Setup([sys.argv[0], *options], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
