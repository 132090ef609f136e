"""External data outside the model's folder, or that are not data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from onnx import TensorProto

from tests.support.hostile.entries import (
    HOSTILE,
    Make,
    chain,
    dump,
)


def external(
    reason: str, prepare: Callable[[Path], object] = lambda folder: None, **entries: str
) -> Make:
    """Enter a model whose first weight lies outside; ``prepare`` writes files beside it."""

    def make(folder: Path) -> bytes:
        (folder / "weights.bin").write_bytes(bytes(4096))
        prepare(folder)
        model = chain()
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        return dump(model)

    return make


def make_secret(folder: Path) -> None:
    (folder.parent / "secret.bin").write_bytes(bytes(4096))


def link_out(folder: Path) -> None:
    make_secret(folder)
    os.symlink(folder.parent / "secret.bin", folder / "link.bin")


_EXTERNAL: Mapping[str, tuple[str, Callable[[Path], object], dict[str, str]]] = {
    "two_dots": ("outside", make_secret, {"location": "../secret.bin"}),
    "dots_inside": ("outside", make_secret, {"location": "a/../../secret.bin"}),
    "absolute_path": ("outside", make_secret, {"location": "/etc/passwd"}),
    "link_out_of_the_folder": ("outside", link_out, {"location": "link.bin"}),
    "link_in_a_circle": (
        "missing or cannot be read",
        lambda folder: os.symlink("circle", folder / "circle"),
        {"location": "circle"},
    ),
    "process_memory": ("outside", make_secret, {"location": "*/_ORT_MEM_ADDR_/*"}),
    "device_zero": ("outside", make_secret, {"location": "/dev/zero"}),
    "link_to_a_device": (
        "outside",
        lambda folder: os.symlink("/dev/zero", folder / "zero"),
        {"location": "zero"},
    ),
    "pipe": (
        "not a file with content",
        lambda folder: os.mkfifo(folder / "pipe"),
        {"location": "pipe"},
    ),
    "folder": ("not a file with content", lambda folder: (folder / "d").mkdir(), {"location": "d"}),
    "the_folder_itself": ("not a file with content", make_secret, {"location": "."}),
    "nothing": ("outside", make_secret, {}),
    "null_byte": ("control characters", make_secret, {"location": "weights\0.bin"}),
    "endless_location": ("a name of", make_secret, {"location": "w/" * 10**5}),
    "offset_beyond_the_end": (
        "declares 192 bytes",
        make_secret,
        {"location": "weights.bin", "offset": "4000"},
    ),
    "offset_that_overflows": (
        "declares 192 bytes",
        make_secret,
        {"location": "weights.bin", "offset": str(2**64 - 8)},
    ),
    "offset_below_zero": (
        "declares 192 bytes",
        make_secret,
        {"location": "weights.bin", "offset": "-8"},
    ),
    "offset_that_is_no_number": (
        "no valid place",
        make_secret,
        {"location": "weights.bin", "offset": "0x10"},
    ),
    "length_that_overflows": (
        "declares 192 bytes",
        make_secret,
        {"location": "weights.bin", "length": str(2**64)},
    ),
    "model_as_its_own_data": (
        "declares 192 bytes",
        make_secret,
        {"location": "model.onnx", "offset": "1000000"},
    ),
}
for _name, (_reason, _prepare, _entries) in _EXTERNAL.items():
    HOSTILE[f"external_{_name}"] = (external(_reason, _prepare, **_entries), _reason)
