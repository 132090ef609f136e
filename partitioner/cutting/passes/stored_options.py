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

from splitonnx.errors import UnsupportedModel, count_some, flatten, list_some
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


@dataclass(frozen=True, kw_only=True)
class Ignored:
    """The names in stored options that have no effect, which the user is told.

    ``missing`` are those that the model does not have.  ``others`` are to be trained or not, but
    are no stored tensors.  ``stops`` are weights, or tensors that no node reads, at which gradients
    are to stop.
    """

    missing: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()


NOTHING = Ignored()
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
        UnsupportedModel: the entry in the metadata is not valid, or contradicts itself.
    """
    text = model.metadata_props.get(KEY)
    if text is None:
        return NONE_STORED
    try:
        stored = _DECODER.decode(text)
    except JSON_ERRORS as error:
        what = f"it is not what this version of splitonnx writes: {flatten(str(error))}"
        raise _refuse(what) from error
    for name in (*stored.freeze, *stored.train, *stored.stop_gradients):
        if not name.isprintable():
            raise _refuse(f"the name {name[:80]!a} in it holds control characters")
    if both := set(stored.freeze).intersection(stored.train):
        raise _refuse(f"it says of {list_some(sorted(both))} that the network trains it, and not")
    return stored


def _refuse(reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the metadata entry '{KEY}'",
        reason,
        "export the model again, or delete the entry and pass freeze, train and "
        "stop_gradients to cut",
    )


def select_stored(
    stored: StoredOptions, graph: ir.Graph, train: Sequence[str], freeze: Sequence[str]
) -> tuple[StoredOptions, Ignored]:
    """Return the stored options that the user does not overrule, and what of them is ignored.

    ``train`` and ``freeze`` are the user's patterns.  A parameter that one of them matches is left
    to them.

    Raises:
        UsageError: a pattern is not a regular expression.
    """
    names = {*stored.freeze, *stored.train}
    decided = {n for pattern in train for n in find_matches(pattern, names, "--train")}
    decided |= {n for pattern in freeze for n in find_matches(pattern, names, "--freeze")}
    values = map_values(graph)
    known = {name for name in names & values.keys() - decided if _may_be_weight(values[name])}
    selected = StoredOptions(
        freeze=tuple(name for name in stored.freeze if name in known),
        train=tuple(name for name in stored.train if name in known),
        stop_gradients=stored.stop_gradients,
    )
    ignored = Ignored(
        missing=tuple(sorted(names - decided - values.keys())),
        others=tuple(sorted(names & values.keys() - decided - known)),
    )
    return selected, ignored


def _may_be_weight(value: ir.Value) -> bool:
    """Return whether a value is stored in the model, maybe as integers that are dequantized."""
    node = value.producer()
    if node is None:
        return value.const_value is not None
    return node.op_type in ("Constant", "DequantizeLinear")


def describe_stored(applied: StoredOptions, ignored: Ignored = NOTHING) -> list[StoredNote]:
    """Describe the stored options that apply, and those that are ignored."""
    return [*_describe_applied(applied), *_describe_ignored(ignored)]


def _describe_applied(applied: StoredOptions) -> list[StoredNote]:
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
    return notes


def _describe_ignored(ignored: Ignored) -> list[StoredNote]:
    notes = []
    if names := ignored.missing:
        notes.append(
            StoredNote(
                sentence=f"the model's file says how to train {count_some(names)}, but the model "
                f"has no such {'tensor' if len(names) == 1 else 'tensors'}: it was changed after "
                "splitonnx.torch.export, and may be trained in other ways than the network",
                names=names,
            )
        )
    if names := ignored.others:
        notes.append(
            StoredNote(
                sentence=f"the model's file says whether to train {count_some(names)}, which "
                f"{'is' if len(names) == 1 else 'are'} not stored in it as "
                f"{'a weight' if len(names) == 1 else 'weights'}; this has no effect",
                names=names,
            )
        )
    if names := ignored.stops:
        notes.append(
            StoredNote(
                sentence=f"the model's file says that no gradient passes through "
                f"{count_some(names)}; this has no effect, since "
                f"{'it is a weight or' if len(names) == 1 else 'they are weights or'} read by no "
                "node",
                names=names,
            )
        )
    return notes


def _pronoun(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"
