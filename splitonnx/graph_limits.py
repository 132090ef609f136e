"""Size limits for the models that ``cut`` accepts, and for the graphs that the runtimes run.

The modules that check models and graphs from untrusted sources are called gates.  They use these
limits and the lists in :mod:`splitonnx.operators`.  ``python -m tests.support.typescript_tables``
generates the copies of these limits and lists for the JavaScript client.  The limits for a stage's
graph are higher than the limits for the model that it was cut from, because gradients and their
expansion into simpler operators add nodes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GraphLimits:
    """Limits that apply both to models and to the graphs of stages."""

    rank: int = 32
    """The number of dimensions of a tensor."""
    text_bytes: int = 1 << 20
    """The size in bytes of a comment, or of one text in an attribute or tensor."""


@dataclass(frozen=True, kw_only=True)
class ModelLimits(GraphLimits):
    """Limits for a user's model; the partitioner checks them when it reads the model."""

    nodes: int = 250_000
    """The number of nodes after each function call is replaced by the nodes of the function."""
    inputs: int = 4096
    """The number of inputs of a node: the more inputs a node has, the longer onnx-ir takes to
    change one of them."""
    depth: int = 64
    """The nesting depth of function calls and of graphs inside nodes, such as branches of If."""
    name_characters: int = 4096
    """The length of a name in characters."""


@dataclass(frozen=True, kw_only=True)
class StageLimits(GraphLimits):
    """Limits for a stage's graph, checked by the Python runtime and by the JavaScript client."""

    total_bytes: int = (1 << 31) - 1
    """The size of a graph in bytes, which is the limit of Protocol Buffers."""
    fields: int = 1 << 24
    """The number of fields in all messages of a graph together.  A training step of ResNet-18 in
    standard operators has 26,000.  With this limit, the gate takes at most about ten seconds."""
    nodes: int = 1 << 20
    """The number of nodes in a graph, plus the number of graphs inside nodes."""
    names: int = 1 << 21
    """The number of names that a graph defines.  The gate keeps them in memory."""
    depth: int = 32
    """The nesting depth of If, Loop and Scan; Protocol Buffers' own parsers have the same limit."""
    type_depth: int = 8
    """The nesting depth of sequence and optional types."""
    attributes: int = 256
    """The number of attributes of a node.  ONNX's own operators have at most a dozen."""
    elements: int = 1 << 40
    """The number of elements of a tensor, not counting dimensions of size 0.  Without this limit,
    an empty tensor could declare sizes that overflow an integer elsewhere."""
    name_bytes: int = 1 << 14
    """The length of a name in bytes: four for each character of the longest name in a model."""


MODEL = ModelLimits()
STAGE = StageLimits()
