"""Size limits of graphs: of a model that ``cut`` accepts, and of a stage's graph that is run.

Together with :mod:`splitonnx.operators`, this is everything that the gates check a graph against.
``python -m tests.support.typescript_tables`` writes both tables for the JavaScript client.  The
limits of a stage's graph are wider than those of the model that it is cut from, because gradients
and their lowerings add nodes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GraphLimits:
    """Limits that apply to every graph."""

    rank: int = 32
    """The number of dimensions of a tensor."""
    text_bytes: int = 1 << 20
    """Bytes of a comment, or of one string in an attribute or tensor."""


@dataclass(frozen=True, kw_only=True)
class ModelLimits(GraphLimits):
    """Limits of a user's model, checked by the partitioner's gate."""

    nodes: int = 250_000
    """The number of nodes, after every function call is replaced by the function's nodes."""
    inputs: int = 4096
    """The inputs of a node: the more there are, the longer onnx-ir takes to change one."""
    depth: int = 64
    """The nesting depth of bodies and function calls."""
    name_characters: int = 4096
    """Characters of a name."""


@dataclass(frozen=True, kw_only=True)
class StageLimits(GraphLimits):
    """Limits of a stage's graph, checked by the gates of both runtimes."""

    total_bytes: int = (1 << 31) - 1
    """Bytes of a graph, which is the limit of Protocol Buffers."""
    fields: int = 1 << 24
    """Fields of a graph, over all its messages; a training step of ResNet-18 in standard operators
    has 26,000.  It bounds the time that the gate takes, to some ten seconds."""
    nodes: int = 1 << 20
    """Nodes and bodies of a graph."""
    names: int = 1 << 21
    """Names that a graph defines, which are kept in memory while it is checked."""
    depth: int = 32
    """The nesting depth of bodies of If, Loop and Scan; Protocol Buffers' parsers stop there."""
    type_depth: int = 8
    """The nesting depth of sequences and optionals."""
    attributes: int = 256
    """Attributes of a node; ONNX's own operators have at most a dozen."""
    elements: int = 1 << 40
    """Elements of a tensor, zero dimensions left out: an empty one may claim more than fits an
    integer elsewhere."""
    name_bytes: int = 1 << 14
    """Bytes of a name: four for each character of the longest name in a model."""


MODEL = ModelLimits()
STAGE = StageLimits()
