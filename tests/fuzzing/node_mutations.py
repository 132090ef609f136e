"""Mutations of nodes: they go, move, read others, become others, or go into a body."""

from __future__ import annotations

from random import Random

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from tests.fuzzing.attributes import add_attributes, pick_operator
from tests.fuzzing.random_parts import (
    pick_node,
)


def delete_node(random: Random, model: ModelProto) -> None:
    nodes = model.graph.node
    if nodes:
        del nodes[random.randrange(len(nodes))]


def bypass_node(random: Random, model: ModelProto) -> None:
    """Remove a node and lead its users to its input."""
    nodes = model.graph.node
    if nodes:
        node = nodes.pop(random.randrange(len(nodes)))
        if node.input and node.output:
            _rename_uses(model.graph, node.output[0], node.input[0])


def _rename_uses(graph: GraphProto, old: str, new: str, start: int = 0) -> None:
    for node in graph.node[start:]:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def swap_nodes(random: Random, model: ModelProto) -> None:
    nodes = model.graph.node
    if len(nodes) > 1:
        first, second = random.choice(nodes), random.choice(nodes)
        kept = NodeProto()
        kept.CopyFrom(first)
        first.CopyFrom(second)
        second.CopyFrom(kept)


def rewire(random: Random, model: ModelProto) -> None:
    """Make a node read another value, as a rule one that stands before it."""
    graph = model.graph
    if not graph.node:
        return
    place = random.randrange(len(graph.node))
    node = graph.node[place]
    earlier = [v.name for v in (*graph.input, *graph.initializer)]
    earlier += [name for n in graph.node[:place] for name in n.output]
    if random.random() < 0.2:
        node.input.append(random.choice(earlier or [""]))
    elif node.input:
        name = random.choice(earlier) if earlier and random.random() < 0.85 else ""
        node.input[random.randrange(len(node.input))] = name


def change_operator(random: Random, model: ModelProto) -> None:
    node = pick_node(random, model)
    node.op_type = pick_operator(random, model).name
    if random.random() < 0.7:
        del node.attribute[:]
    add_attributes(random, model, node)


def insert_node(random: Random, model: ModelProto) -> None:
    """Put a node of any operator behind a value, and lead the value's users to it."""
    graph = model.graph
    place = random.randrange(len(graph.node) + 1)
    before = [v.name for v in (*graph.input, *graph.initializer)]
    before += [name for n in graph.node[:place] for name in n.output if name]
    if not before:
        return
    source = before[-1] if random.random() < 0.5 else random.choice(before)
    schema = pick_operator(random, model)
    count = random.randint(schema.min_input, max(schema.min_input, min(schema.max_input, 4)))
    inputs = [source, *(random.choice(before) for _ in range(count - 1))]
    outputs = [f"inserted{random.randrange(10**6)}_{i}" for i in range(schema.min_output or 1)]
    node = helper.make_node(schema.name, inputs[:count], outputs, name=f"{outputs[0]}_node")
    add_attributes(random, model, node)
    _rename_uses(graph, source, outputs[0], place)
    graph.node.insert(place, node)


def nest(random: Random, model: ModelProto) -> None:
    """Put a node into the branches of an If, or into a function."""
    graph = model.graph
    if not graph.node:
        return
    place = random.randrange(len(graph.node))
    node = NodeProto()
    node.CopyFrom(graph.node[place])
    if random.random() < 0.5:
        condition = f"condition{random.randrange(10**6)}"
        graph.initializer.append(numpy_helper.from_array(np.array(True), condition))
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
        body = helper.make_graph([node], "body", [], outputs)
        for value in body.output:
            value.type.tensor_type.elem_type = 1
        made = helper.make_node("If", [condition], list(node.output))
        for name in ("then_branch", "else_branch"):
            made.attribute.append(helper.make_attribute(name, body))
    else:
        name = f"F{random.randrange(3)}"
        model.functions.append(
            helper.make_function(
                "mine", name, list(dict.fromkeys(node.input)), list(node.output), [node],
                list(model.opset_import),
            )
        )  # fmt: skip
        if not any(entry.domain == "mine" for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid("mine", 1))
        made = helper.make_node(
            name, list(dict.fromkeys(node.input)), list(node.output), domain="mine"
        )
    graph.node[place].CopyFrom(made)
