"""Repeat a traced block in the graph instead of tracing it again.

The law: if the last traced block reads from the one before it exactly what that one read
from its own predecessor, and everything else they read is the same (or the same parameter
of another block), then the next block is the last one with its parameters renamed. The law
is checked node by node on the last two of two or more traced blocks, and the last is copied
to full depth. A graph that breaks it raises NotAChain, and the caller traces every block.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overcrank.models.base import Repeat

if TYPE_CHECKING:
    import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"


class NotAChain(Exception):
    """The traced blocks do not repeat; the message says where."""


@dataclass
class _Chain:
    """The last traced block and how it reads the one before it."""

    nodes: list[ir.Node]
    parameters: dict[ir.Value, str]  # read by the block → name within the block
    carried: dict[ir.Value, ir.Value]  # value of the block before → its counterpart in the block


def repeat_chain(model: ir.Model, repeat: Repeat) -> None:
    """Extend the chain at `repeat.path` from `repeat.traced` to `repeat.full` blocks, in place."""
    graph = model.graph
    blocks = _blocks(graph, repeat)
    chain = _checked_chain(blocks, repeat)
    tail = _tail_uses(blocks)
    _make_room(graph, repeat)
    point = chain.nodes[-1]
    newest = {v: v for node in chain.nodes for v in node.outputs}
    for index in range(repeat.traced, repeat.full):
        reads = {v: newest[w] for v, w in chain.carried.items()}
        for value, name in chain.parameters.items():
            reads[value] = _input_like(graph, value, f"{repeat.path}.{index}.{name}")
        copies: dict[ir.Value, ir.Value] = {}
        for node in chain.nodes:
            clone = _clone(node, [v and (copies.get(v) or reads.get(v, v)) for v in node.inputs], index)
            copies.update(zip(node.outputs, clone.outputs, strict=True))
            graph.insert_after(point, clone)
            point = clone
        newest = copies
    for user, position, value in tail:
        user.replace_input_with(position, newest[value])
    for i, value in enumerate(graph.outputs):
        if value in newest and newest[value] is not value:
            newest[value].name, value.name = value.name, newest[value].name
            graph.outputs[i] = newest[value]
    graph.sort()


def _blocks(graph: ir.Graph, repeat: Repeat) -> list[list[ir.Node]]:
    """Nodes of each traced block, in topological order.

    A node that lost its scope to a rewrite belongs to the block that alone reads it.
    """
    names = {f"module.{repeat.path}.{i}": i for i in range(repeat.traced)}
    home: dict[ir.Node, int] = {}
    for node in reversed(graph):
        if SCOPES in node.metadata_props:
            scopes = ast.literal_eval(node.metadata_props[SCOPES])
            indices = {names[s] for s in scopes if s in names}
        else:
            indices = {home.get(user, -1) for value in node.outputs for user, _ in value.uses()}
        if len(indices) == 1 and -1 not in indices:
            home[node] = indices.pop()
    blocks: list[list[ir.Node]] = [[] for _ in range(repeat.traced)]
    for node in graph:
        if node in home:
            blocks[home[node]].append(node)
    return blocks


def _checked_chain(blocks: list[list[ir.Node]], repeat: Repeat) -> _Chain:
    before, last = blocks[-2:]
    first = blocks[-3] if len(blocks) > 2 else None
    if not last or len(before) != len(last):
        raise NotAChain(f"blocks of {repeat.path} have {len(before)} and {len(last)} nodes")
    prefixes = [f"{repeat.path}.{repeat.traced - back}." for back in (2, 1)]
    counterpart: dict[ir.Value, ir.Value] = {}  # of `last` → of `before`
    reads: dict[ir.Value, ir.Value] = {}  # what `last` read from outside → what `before` read there
    for old, new in zip(before, last, strict=True):
        if not _alike(old, new):
            raise NotAChain(f"{new.op_type} node {new.name} has no counterpart in the block before")
        for u, v in zip(old.inputs, new.inputs, strict=True):
            if v in counterpart:
                if counterpart[v] is not u:
                    raise NotAChain(f"{new.name} reads {v} where the block before reads {u}")
            elif v is not None and reads.setdefault(v, u) is not u:  # type: ignore[arg-type]
                raise NotAChain(f"{v} stands for two values of the block before")
        counterpart.update(zip(new.outputs, old.outputs, strict=True))
    inverse = {u: v for v, u in counterpart.items()}
    chain = _Chain(last, {}, {})
    for v, u in reads.items():
        name = str(v.name).removeprefix(prefixes[1])
        if name != v.name and v.producer() is None:
            if str(u.name) != prefixes[0] + name:
                raise NotAChain(f"parameter {v.name} stands where {u.name} stood")
            chain.parameters[v] = name
        elif v in inverse:
            producer, earlier = v.producer(), u.producer()
            if first is not None and (earlier not in first or not _alike(producer, earlier)):
                raise NotAChain(f"{v.name} is carried on, but {u.name} is not its counterpart")
            chain.carried[v] = inverse[v]
        elif v is not u:
            raise NotAChain(f"one block reads {u.name}, the next {v.name}")
    return chain


def _alike(a: ir.Node | None, b: ir.Node | None) -> bool:
    return (
        a is not None
        and b is not None
        and (a.op_type, a.domain, len(a.inputs), len(a.outputs)) == (b.op_type, b.domain, len(b.inputs), len(b.outputs))
        and [v is None for v in a.inputs] == [v is None for v in b.inputs]
        and {k: str(v.value) for k, v in a.attributes.items()} == {k: str(v.value) for k, v in b.attributes.items()}
    )


def _tail_uses(blocks: list[list[ir.Node]]) -> list[tuple[ir.Node, int, ir.Value]]:
    """Reads of the last block's values after the chain; earlier blocks may have none."""
    before, last = blocks[-2:]
    inside = {*before, *last}
    for node in before:
        for value in node.outputs:
            if value.is_graph_output() or any(user not in inside for user, _ in value.uses()):
                raise NotAChain(f"{value.name} of an inner block is read outside the chain")
    return [
        (user, position, value)
        for node in last
        for value in node.outputs
        for user, position in value.uses()
        if user not in inside
    ]


def _make_room(graph: ir.Graph, repeat: Repeat) -> None:
    """Parameters of the submodules after the chain get the names they have behind its full length."""
    for i in reversed(range(repeat.after)):
        now, then = (f"{repeat.path}.{depth + i}." for depth in (repeat.traced, repeat.full))
        for value in graph.inputs:
            if str(value.name).startswith(now):
                value.name = then + str(value.name).removeprefix(now)


def _input_like(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    import onnx_ir as ir

    graph_input = ir.Value(name=name, shape=value.shape, type=value.type)
    graph.inputs.append(graph_input)
    return graph_input


def _clone(node: ir.Node, inputs: list[ir.Value | None], index: int) -> ir.Node:
    import onnx_ir as ir

    clone = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        node.attributes.values(),
        num_outputs=len(node.outputs),
        name=f"{node.name}_{index}",
        metadata_props=dict(node.metadata_props),
    )
    for old, new in zip(node.outputs, clone.outputs, strict=True):
        new.name, new.shape, new.type = f"{old.name}_{index}", old.shape, old.type
    return clone
