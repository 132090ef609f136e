"""Make float weights from the integer weights of a quantized model.

A float weight gets the name that it had before it was quantized, which is the name of the integers
without the ending that ONNX Runtime's tools append.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array

_ENDING = "_quantized"
_PAIR_VERSION = 13
"""The first opset in which QuantizeLinear and DequantizeLinear have scales for each channel."""

MOVING = frozenset(
    {"Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that only select or move the elements of their first input."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The scale of integers and their zero point, which is 0 if it is ``None``.

    ``axes`` are the axes of the integers to which the axes of the scale belong, if it has several
    elements.
    """

    scale: ir.Value
    zero: ir.Value | None
    axes: tuple[int, ...] = (-1,)


@dataclass(kw_only=True)
class FloatWeights:
    """The float weights made for a model.

    If ``is_rounding`` is true, activations are still rounded to integers where the model does so.
    If ``is_static`` is true, the model rounds activations with stored scales.  ``taken`` holds the
    names of all tensors, ``names`` those of the weights that were made, and ``chosen`` those of
    weights and activations that have the names of the float model again.  ``moved`` holds the
    floats that operators make of whole weights, by the integers that they made before.
    """

    is_rounding: bool
    taken: set[str]
    is_static: bool = False
    names: list[str] = field(default_factory=list)
    chosen: set[str] = field(default_factory=set)
    moved: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)
    _made: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)

    def make(
        self,
        node: ir.Node,
        integers: ir.Value,
        settings: Settings,
        order: Sequence[int] | None = None,
    ) -> ir.Value:
        """Return a float weight for ``integers``, which ``node`` reads, with its axes in ``order``.

        Raises:
            UnsupportedModel: the integers, their scale or zero point are not stored in the model,
                or the scale does not fit the integers.
        """
        key = ("float", integers, settings.scale, settings.zero, settings.axes, order and (*order,))
        if key not in self._made:
            floats = self.compute(node, integers, settings)
            floats = floats if order is None else np.ascontiguousarray(floats.transpose(order))
            self._made[key] = self.store(node, integers, floats)
        return self._made[key]

    def compute(self, node: ir.Node, integers: ir.Value, settings: Settings) -> np.ndarray:
        """Return the floats ``(integer - zero point) * scale``, of the type of the scale."""
        whole = _read(node, integers)
        scale, zero = _read(node, settings.scale), np.zeros((), np.int32)
        if settings.zero is not None:
            zero = _read(node, settings.zero)
        spread = [
            _spread(node, array, whole, settings.axes).astype(np.float64) for array in (zero, scale)
        ]
        floats: np.ndarray = ((whole.astype(np.float64) - spread[0]) * spread[1]).astype(
            scale.dtype
        )
        return floats

    def store(self, node: ir.Node, integers: ir.Value, floats: np.ndarray) -> ir.Value:
        """Store floats made from ``integers`` in the graph that holds the integers."""
        owner = integers.graph if integers.is_initializer() else node.graph
        assert isinstance(owner, ir.Graph)
        name = self.choose_name(integers.name or "weight")
        value = ir.Value(name=name, const_value=ir.tensor(floats, name=name))
        owner.register_initializer(value)
        self.names.append(name)
        return value

    def pair(
        self, builder: NodeBuilder, node: ir.Node, integers: ir.Value, settings: Settings
    ) -> ir.Value:
        """Return the floats of ``integers``, computed by a DequantizeLinear.

        There is one for all nodes with the same settings.  Its result has the name that the floats
        had before the model was quantized, and so have integers that are stored in the model.
        """
        key = _make_key(integers, settings, node.graph)
        if key in self._made:
            return self._made[key]
        given = self._find_later(node, integers, settings)
        if given is not None and node.graph is not None:  # it stands behind the node
            node.graph.remove(given)
            builder.nodes.append(given)
            self._made[key] = given.outputs[0]
            return given.outputs[0]
        if known_array(integers) is not None:
            integers = self._rename(node, integers)
        inputs = [integers, settings.scale, *([] if settings.zero is None else [settings.zero])]
        made = builder.op("DequantizeLinear", *inputs, axis=settings.axes[0])
        if integers.producer() is not None:
            made.name = self.choose_name(integers.name or "activation")
        mark_version(made, node)
        self._made[key] = made
        return made

    def keep(self, node: ir.Node) -> None:
        """Note a DequantizeLinear of the model, which serves the nodes after it as well."""
        integers, scale, zero = (*node.inputs, None)[:3]
        if integers is not None and scale is not None:
            settings = Settings(scale=scale, zero=zero)
            self._made.setdefault(_make_key(integers, settings, node.graph), node.outputs[0])

    def _find_later(self, node: ir.Node, integers: ir.Value, settings: Settings) -> ir.Node | None:
        """Return a DequantizeLinear after ``node`` that has the same inputs."""
        read = [integers, settings.scale, *([] if settings.zero is None else [settings.zero])]
        if is_channelwise(settings):
            return None
        others = [use.node for use in integers.uses() if use.node.graph is node.graph]
        found = [n for n in others if n.op_type == "DequantizeLinear" and list(n.inputs) == read]
        return found[0] if found else None

    def _rename(self, node: ir.Node, integers: ir.Value) -> ir.Value:
        """Return stored integers under the name that they had as floats."""
        name, owner, array = integers.name or "", integers.graph, _read(node, integers)
        dtype = integers.dtype
        if name in self.names:
            return integers
        if not integers.is_initializer():  # such as the output of a Constant
            owner, integers = node.graph, ir.Value()
        elif name.endswith(_ENDING) and isinstance(owner, ir.Graph):
            owner.initializers.pop(name)
        else:
            self.names.append(name)
            return integers
        assert isinstance(owner, ir.Graph)
        chosen = self.choose_name(name)
        # a tensor of its own, because the model given shares the old one, and a value names both
        integers.const_value = ir.tensor(array, dtype=dtype, name=chosen)
        integers.name = chosen
        owner.register_initializer(integers)
        self.names.append(chosen)
        return integers

    def choose_name(self, name: str) -> str:
        """Return the name that a tensor had in the float model, or a new one like it."""
        plain = name.removesuffix(_ENDING) or name
        chosen, count = plain, 1
        while chosen in self.taken:
            chosen = f"{plain}#float" if count == 1 else f"{plain}#float{count}"
            count += 1
        self.taken.add(chosen)
        self.chosen.add(chosen)
        return chosen


def _make_key(
    integers: ir.Value, settings: Settings, graph: ir.Graph | ir.Function | None
) -> tuple[object, ...]:
    axes = settings.axes if is_channelwise(settings) else ()
    return ("pair", integers, settings.scale, settings.zero, axes, graph)


def is_channelwise(settings: Settings) -> bool:
    """Return whether a scale has several elements."""
    known = known_array(settings.scale)
    return known is not None and known.size > 1


def check_single(node: ir.Node, settings: Settings) -> Settings:
    """Return the settings of an activation, which must have one scale and one zero point.

    Raises:
        UnsupportedModel: there are several, as for the rows of a matrix.
    """
    zero = known_array(settings.zero)
    if is_channelwise(settings) or (zero is not None and zero.size > 1):
        raise refuse(node, f"'{settings.scale.name}' is not one scale for a whole activation")
    return settings


def mark_version(value: ir.Value, node: ir.Node) -> None:
    """Set the opset of the node that makes ``value`` to one with scales for each channel.

    ``node`` is the node that it stands for, in the model's own opset.
    """
    maker = value.producer()
    assert maker is not None
    maker.version = max(node.version or 1, _PAIR_VERSION)


def refuse(node: ir.Node, reason: str) -> UnsupportedModel:
    """Return an error for a node that cannot be turned into arithmetic with floats."""
    return UnsupportedModel(
        f"node '{node.name}' ({node.op_type})",
        f"{reason}, so it cannot be dequantized",
        "train the float model that was quantized, or quantize it in QDQ format",
    )


def _read(node: ir.Node, value: ir.Value) -> np.ndarray:
    array = known_array(value)
    if array is None:
        raise refuse(node, f"'{value.name}' is not stored in the model")
    return array


def _spread(
    node: ir.Node, setting: np.ndarray, whole: np.ndarray, axes: Sequence[int]
) -> np.ndarray:
    """Reshape a scale or zero point, which has one element in all or for each channel."""
    if setting.size == 1:
        return setting.reshape(())
    sizes = setting.shape if setting.ndim <= len(axes) else setting.squeeze().shape
    places = [axis % whole.ndim for axis in axes[: len(sizes)]] if whole.ndim else []
    if tuple(whole.shape[place] for place in places) != sizes:
        raise refuse(
            node, f"a scale or zero point of shape {setting.shape} does not fit {whole.shape}"
        )
    return setting.reshape([n if a in places else 1 for a, n in enumerate(whole.shape)])
