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
    """Dimensions of a tensor."""
    text_bytes: int = 1 << 20
    """Bytes of a comment, or of one text in an attribute or tensor."""


@dataclass(frozen=True, kw_only=True)
class ModelLimits(GraphLimits):
    """Limits of a user's model, checked by the partitioner's gate."""

    nodes: int = 250_000
    """Nodes, once every call of a function is replaced by the function's nodes."""
    inputs: int = 4096
    """Inputs of a node: onnx-ir takes longer to change one of them, the more there are."""
    depth: int = 64
    """Bodies and function calls inside one another."""
    name_characters: int = 4096
    """Characters of a name."""


@dataclass(frozen=True, kw_only=True)
class StageLimits(GraphLimits):
    """Limits of a stage's graph, checked by the gates of both runtimes."""

    total_bytes: int = (1 << 31) - 1
    """Bytes of a graph; Protocol Buffers end there."""
    fields: int = 1 << 24
    """Fields of a graph, over all its messages; a training step of ResNet-18 in standard operators
    has 26,000.  It bounds the time that the gate takes, to some ten seconds."""
    nodes: int = 1 << 20
    """Nodes and bodies of a graph."""
    names: int = 1 << 21
    """Names that a graph defines; they are kept while it is checked."""
    depth: int = 32
    """Bodies of If, Loop and Scan inside one another; Protocol Buffers' own parsers end there."""
    type_depth: int = 8
    """Sequences and optionals inside one another."""
    attributes: int = 256
    """Attributes of a node; ONNX's own operators have at most a dozen."""
    elements: int = 1 << 40
    """Elements of a tensor, zero dimensions left out: an empty one may claim more than fits an
    integer elsewhere."""
    name_bytes: int = 1 << 14
    """Bytes of a name: four for each character of a model's longest."""


MODEL = ModelLimits()
STAGE = StageLimits()
