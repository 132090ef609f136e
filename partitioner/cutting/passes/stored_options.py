"""Read and write options of a cut that are stored in the model's file.

ONNX cannot express that a parameter is not trained, or that no gradient passes through a tensor.
:mod:`splitonnx.torch` therefore stores in the metadata what its export found out about the network.
Stored options apply as if the user gave them, but what the user gives takes precedence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import onnx
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel, count_some
from splitonnx.json_errors import JSON_ERRORS
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.normalization.weights import find_matches, make_pattern

KEY = "splitonnx.options"
"""The key of the metadata; its value is :class:`StoredOptions` as JSON."""


class StoredOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The names in a model's file of what is frozen, trained, and where gradients stop.

    These are names of tensors, not patterns.
    """

    freeze: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    stop_gradients: tuple[str, ...] = ()


NONE_STORED = StoredOptions()
_DECODER = msgspec.json.Decoder(StoredOptions)


@dataclass(frozen=True, kw_only=True)
class StoredNote:
    """A sentence on stored options, the tensors that it names, and the options that change it.

    Each of ``options`` is the name of an option of ``cut`` and its value.
    """

    sentence: str
    names: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        ways = "".join(f"; {name} '{value}' changes this" for name, value in self.options)
        return f"{self.sentence}{ways}"


def write_stored(model: onnx.ModelProto, stored: StoredOptions) -> None:
    """Store options in a model, in place; nothing is stored if there are none."""
    if stored != NONE_STORED:
        model.metadata_props.add(key=KEY, value=msgspec.json.encode(stored).decode())


def read_stored(model: ir.Model) -> StoredOptions:
    """Read the options that are stored in a model.

    Raises:
        UnsupportedModel: the entry in the metadata is not valid.
    """
    text = model.metadata_props.get(KEY)
    if text is None:
        return NONE_STORED
    try:
        return _DECODER.decode(text)
    except JSON_ERRORS as error:
        raise UnsupportedModel(
            f"the metadata entry '{KEY}'",
            f"it is not what this version of splitonnx writes: {error}",
            "export the model again, or delete the entry and pass freeze, train and "
            "stop_gradients to cut",
        ) from error


def select_stored(
    stored: StoredOptions, graph: ir.Graph, train: Sequence[str], freeze: Sequence[str]
) -> tuple[StoredOptions, list[str]]:
    """Return the stored options that the user does not overrule, and the names that are missing.

    ``train`` and ``freeze`` are the user's patterns.  A parameter that one of them matches is left
    to them.  Parameters that the graph does not have are missing.

    Raises:
        UsageError: a pattern is not a regular expression.
    """
    names = {*stored.freeze, *stored.train}
    decided = {n for pattern in train for n in find_matches(pattern, names, "--train")}
    decided |= {n for pattern in freeze for n in find_matches(pattern, names, "--freeze")}
    known = set(map_values(graph))
    selected = StoredOptions(
        freeze=tuple(name for name in stored.freeze if name in known - decided),
        train=tuple(name for name in stored.train if name in known - decided),
        stop_gradients=stored.stop_gradients,
    )
    return selected, sorted(names - decided - known)


def describe_stored(applied: StoredOptions, missing: Sequence[str]) -> list[StoredNote]:
    """Describe the stored options that apply, and the tensors that the model no longer has."""
    notes = []
    if names := applied.freeze:
        notes.append(
            StoredNote(
                sentence=f"{count_some(names)}: not trained, as the model's file says, since the "
                f"network does not train {_pronoun(names)}",
                names=names,
                options=(("--train", make_pattern(names)),),
            )
        )
    if names := applied.train:
        notes.append(
            StoredNote(
                sentence=f"{count_some(names)}: trained, as the model's file says, since the "
                f"network trains {_pronoun(names)}",
                names=names,
                options=(("--freeze", make_pattern(names)),),
            )
        )
    if names := applied.stop_gradients:
        notes.append(
            StoredNote(
                sentence=f"no gradient passes through {count_some(names)}, as the model's file "
                "says, since none does in the network",
                names=names,
            )
        )
    if missing:
        notes.append(
            StoredNote(
                sentence=f"the model's file says how to train {count_some(missing)}, but the model "
                f"has no such {'tensor' if len(missing) == 1 else 'tensors'}: it was changed after "
                "splitonnx.torch.export, and may be trained in other ways than the network",
                names=tuple(missing),
            )
        )
    return notes


def _pronoun(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"
