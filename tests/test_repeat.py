"""One block of a chain repeated in the graph: the law that is checked first, and what the longer graph computes."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from overcrank.export.repeat import SCOPES, NotAChain, repeat_chain
from overcrank.models.base import Repeat

from tests.graphs import computed, graph_of, operators

pytestmark = pytest.mark.quick
PATH = "blocks"


def traced(text: str, blocks: int) -> ir.Model:
    """A graph whose node [b1_…] is of block 1; others are of no block. Names in the text have _ for a dot."""
    model = graph_of(text)
    for value in model.graph.inputs:
        value.name = re.sub(r"^blocks_(\d)_", r"blocks.\1.", str(value.name))
    for node in model.graph:
        for i in range(blocks):
            if str(node.name).startswith(f"b{i}_"):
                node.metadata_props[SCOPES] = repr(["module", f"module.{PATH}.{i}", "node"])
    return model


def block(i: int, before: str, *, operator: str = "Mul", weight: str = "", shared: str = "s") -> str:
    """h ← h · weight + shared: what every block here is, but for what a test changes."""
    parameter = weight or f"blocks_{i}_weight"
    return f"""
        [b{i}_scale] m{i} = {operator}({before}, {parameter})
        [b{i}_shift] h{i} = Add(m{i}, {shared})"""


def chain(blocks: int, *, tail: str = "y = Neg(h{last})", parameters: str = "", body: str = "") -> str:
    """A graph of so many blocks over `x`, with an input `s` that all of them read."""
    weights = parameters or ", ".join(f"float[2] blocks_{i}_weight" for i in range(blocks))
    written = body or "".join(block(i, f"h{i - 1}" if i else "x") for i in range(blocks))
    return f"g (float[2] x, float[2] s, {weights}) => (float[2] y) {{ {written} {tail.format(last=blocks - 1)} }}"


def values(depth: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = ["x", "s", *(f"{PATH}.{i}.weight" for i in range(depth))]
    return {name: rng.integers(-3, 4, 2).astype(np.float32) for name in names}


@pytest.mark.parametrize(("blocks", "depth"), [(2, 2), (2, 5), (3, 3), (3, 7)])
def test_a_longer_chain_computes_what_all_blocks_would(blocks: int, depth: int) -> None:
    model = traced(chain(blocks), blocks)
    repeat_chain(model, Repeat(PATH, blocks, depth))
    assert [v.name for v in model.graph.inputs] == ["x", "s", *(f"{PATH}.{i}.weight" for i in range(depth))]
    assert operators(model) == [*["Mul", "Add"] * depth, "Neg"]
    given = values(depth)
    h = given["x"]
    for i in range(depth):
        h = h * given[f"{PATH}.{i}.weight"] + given["s"]
    assert np.array_equal(computed(model, **given)[0], -h)


def test_the_last_block_s_value_may_be_the_graph_s_output() -> None:
    model = traced(chain(2, tail="").replace("h1", "y"), 2)
    repeat_chain(model, Repeat(PATH, 2, 3))
    given = values(3)
    h = given["x"]
    for i in range(3):
        h = h * given[f"{PATH}.{i}.weight"] + given["s"]
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert np.array_equal(computed(model, **given)[0], h)


def test_a_node_without_a_scope_is_of_the_block_that_alone_reads_it() -> None:
    """As a rewrite leaves one: here the shared input is negated in each block anew."""
    body = "".join(
        f"\n n{i} = Neg(s) {block(i, f'h{i - 1}' if i else 'x', shared=f'n{i}')}" for i in range(2)
    )  # not [b0_…]
    model = traced(chain(2, body=body), 2)
    repeat_chain(model, Repeat(PATH, 2, 3))
    assert operators(model).count("Neg") == 3 + 1
    given = values(3)
    h = given["x"]
    for i in range(3):
        h = h * given[f"{PATH}.{i}.weight"] - given["s"]
    assert np.array_equal(computed(model, **given)[0], -h)


def test_parameters_behind_the_chain_get_the_names_of_its_full_length() -> None:
    """blocks.2 is a submodule of another kind, which is blocks.4 once two blocks are four."""
    parameters = ", ".join(f"float[2] blocks_{i}_weight" for i in range(3))
    model = traced(chain(2, parameters=parameters, tail="y = Mul(h1, blocks_2_weight)"), 2)
    repeat_chain(model, Repeat(PATH, 2, 4, after=1))
    assert {v.name for v in model.graph.inputs} == {"x", "s", *(f"{PATH}.{i}.weight" for i in range(5))}
    given = values(5)
    h = given["x"]
    for i in range(4):
        h = h * given[f"{PATH}.{i}.weight"] + given["s"]
    assert np.array_equal(computed(model, **given)[0], h * given[f"{PATH}.4.weight"])


def test_two_values_are_carried_on() -> None:
    """h and g change places at each block: the next must read them as this one did."""

    def crossed(i: int) -> str:
        h, g = (f"h{i - 1}", f"g{i - 1}") if i else ("x", "s")
        return f"""
        [b{i}_h] h{i} = Mul({g}, blocks_{i}_weight)
        [b{i}_g] g{i} = Sub({h}, {g})"""

    model = traced(chain(3, body="".join(map(crossed, range(3))), tail="y = Add(h2, g2)"), 3)
    repeat_chain(model, Repeat(PATH, 3, 6))
    given = values(6)
    h, g = given["x"], given["s"]
    for i in range(6):
        h, g = g * given[f"{PATH}.{i}.weight"], h - g
    assert np.array_equal(computed(model, **given)[0], h + g)


OTHER = "float[2] other"
BOTH = "float[2] blocks_0_weight, float[2] blocks_1_weight"
NO_CHAIN = {
    "a block of another length": (
        chain(2, body=f"{block(0, 'x')} {block(1, 'h0')}\n [b1_more] k1 = Neg(h1)", tail="y = Neg(k1)"),
        "blocks of blocks have 2 and 3 nodes",
    ),
    "another operator": (
        chain(2, body=block(0, "x") + block(1, "h0", operator="Div")),
        "Div node b1_scale has no counterpart",
    ),
    "another attribute": (
        chain(
            2,
            body="".join(f"\n [b{i}_n] h{i} = Softmax<axis={-i}>({h})" for i, h in enumerate(("x", "h0"))),
        ),
        "Softmax node b1_n has no counterpart",
    ),
    "a parameter of another name": (
        chain(
            2,
            parameters=f"{BOTH}, float[2] blocks_1_bias",
            body=block(0, "x") + block(1, "h0", weight="blocks_1_bias"),
        ),
        r"parameter blocks\.1\.bias stands where blocks\.0\.weight stood",
    ),
    "something that one block alone reads": (
        chain(2, parameters=f"{BOTH}, {OTHER}", body=block(0, "x") + block(1, "h0", shared="other")),
        "one block reads s, the next other",
    ),
    "one value where there were two": (
        chain(2, body="\n [b0_a] m0 = Add(x, s)\n [b0_b] h0 = Mul(m0, blocks_0_weight)"
                      "\n [b1_a] m1 = Add(h0, h0)\n [b1_b] h1 = Mul(m1, blocks_1_weight)"),
        "stands for two values of the block before",
    ),
    "another value of the block itself": (
        chain(2, body="\n [b0_a] m0 = Add(x, s)\n [b0_b] h0 = Mul(m0, x)"
                      "\n [b1_a] m1 = Add(h0, s)\n [b1_b] h1 = Mul(m1, m1)"),
        "b1_b reads .* where the block before reads",
    ),
    "a skip past a block": (
        chain(3, body=block(0, "x") + block(1, "x") + block(2, "h0")),
        "one block reads x, the next h0",
    ),
    "an inner value that is read behind the chain": (
        chain(2, tail="y = Add(h0, h1)"),
        "h0 of an inner block is read outside the chain",
    ),
    "a first block that feeds the second otherwise": (
        chain(3, body="\n [b0_scale] m0 = Add(x, blocks_0_weight)\n [b0_shift] h0 = Mul(m0, s)"
                      + block(1, "h0") + block(2, "h1")),
        "h1 is carried on, but h0 is not its counterpart",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_CHAIN)
def test_what_is_no_chain_is_refused_and_left(case: str) -> None:
    text, says = NO_CHAIN[case]
    blocks = 3 if "[b2_" in text else 2
    model = traced(text, blocks)
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(NotAChain, match=says):
        repeat_chain(model, Repeat(PATH, blocks, 6))
    assert ir.to_proto(model).SerializeToString() == before, "the caller converts the network anew, and from this"
