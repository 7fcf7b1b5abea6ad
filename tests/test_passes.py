"""Each rewrite of a converted graph on a graph of a few nodes: wanted results stand here by hand, from the
specification of ONNX."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from overcrank.export.passes import clean, deduplicate, products_in_fp16, reshapes_without_arithmetic

from tests.graphs import computed, graph_of, operators

pytestmark = pytest.mark.quick

# ── products in fp16 ─────────────────────────────────────────────────────────────────


def test_what_is_kept_in_fp32_is_multiplied_in_fp16() -> None:
    """Also where the product's type is not written down, and it has two readers."""
    full = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape([3, 8]), type=full)
    w = ir.Value(name="w", shape=ir.Shape([8, 4]), type=full)
    product = ir.node("MatMul", [x, w])
    last = ir.node("Add", [product.outputs[0], product.outputs[0]])
    y = last.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([3, 4]), full
    model = ir.Model(ir.Graph([x, w], [y], nodes=[product, last], opset_imports={"": 23}, name="g"), ir_version=10)
    products_in_fp16(model)
    assert operators(model) == ["Cast", "Cast", "MatMul", "Cast", "Add"]
    (result,) = computed(model, x=np.full((3, 8), 1.0001, np.float32), w=np.full((8, 4), 1.0, np.float32))
    assert result.dtype == np.float32
    assert np.array_equal(result, np.full((3, 4), 16.0, np.float32))  # 1.0001 is 1 in fp16
    products_in_fp16(model)
    assert len(model.graph) == 5


def test_a_bias_is_narrowed_and_a_missing_one_left_out() -> None:
    """Conv with and without the third input that it may lack; what is no product keeps fp32."""
    model = graph_of("""g (float[1,1,4] x, float[1,1,1] w, float[1] b) => (float[1,1,4] y, float[1,1,4] z) {
        p = Conv(x, w, b)
        q = Conv(x, w)
        y = Mul(p, x)
        z = Mul(q, x)
    }""")
    products_in_fp16(model)
    assert operators(model) == [*["Cast"] * 3, "Conv", "Cast", *["Cast"] * 2, "Conv", "Cast", "Mul", "Mul"]
    x = np.array([[[1.0001, 2.0, 3.0, 4.0]]], np.float32)
    y, z = computed(model, x=x, w=np.full((1, 1, 1), 2.0, np.float32), b=np.array([0.5], np.float32))
    assert np.array_equal(y, np.array([[[2.5, 4.5, 6.5, 8.5]]], np.float32) * x)
    assert np.array_equal(z, np.array([[[2.0, 4.0, 6.0, 8.0]]], np.float32) * x)
    assert {value.name: value.dtype for value in model.graph.inputs} == dict.fromkeys("xwb", ir.DataType.FLOAT)


def test_products_in_bf16_are_left_alone() -> None:
    model = graph_of("g (bfloat16[2,2] x, bfloat16[2,2] w) => (bfloat16[2,2] y) { y = MatMul(x, w) }")
    products_in_fp16(model)
    assert operators(model) == ["MatMul"]


# ── targets of Reshape ───────────────────────────────────────────────────────────────

# input's and output's axes → the target that is to stand there, as the specification reads it: 0 copies the axis of
# that place, -1 is what is left over
TARGETS = {
    "axes of the same place are copied": ("B,S,32", "B,S,4,8", [0, 0, 4, 8]),
    "one that is unknown is what is left": ("B,S,32", "T,32", [-1, 32]),
    "one that moved is what is left": ("4,S,8", "S,32", [-1, 32]),
    "numbers alone": ("4,8", "2,16", [2, 16]),
    "a number of the same place is written": ("B,8", "B,2,4", [0, 2, 4]),
}


@pytest.mark.parametrize("case", TARGETS)
def test_a_target_needs_no_arithmetic(case: str) -> None:
    before, after, target = TARGETS[case]
    text = (
        f"g (float[{before}] x, int64[{after.count(',') + 1}] shape) => (float[{after}] y) {{ y = Reshape(x, shape) }}"
    )
    model = graph_of(text)
    assert reshapes_without_arithmetic(model)
    (node,) = model.graph
    constant = node.inputs[1]
    assert constant is not None
    assert constant.const_value is not None
    assert constant.const_value.numpy().tolist() == target
    for sizes in ({"B": 2, "S": 3}, {"B": 1, "S": 5}):
        sizes["T"] = sizes["B"] * sizes["S"]
        given, wanted = ([sizes.get(d) or int(d) for d in axes.split(",")] for axes in (before, after))
        x = np.arange(np.prod(given), dtype=np.float32).reshape(given)
        (y,) = computed(model, x=x, shape=np.array(wanted))
        assert np.array_equal(y, x.reshape(wanted))


def test_a_second_unknown_is_read_from_an_input_once() -> None:
    """[B·S, 8] → [B, S, 8] twice: B is an input's, S is left over, and both have one target."""
    model = graph_of("""g (float[B,S,8] z, float[T,8] x, int64[3] shape) => (float[B,S,8] y, float[B,S,8] v) {
        y = Reshape(x, shape)
        n = Neg(x)
        v = Reshape(n, shape)
    }""")
    assert reshapes_without_arithmetic(model)
    assert operators(model) == ["Shape", "Concat", "Reshape", "Neg", "Reshape"]
    z = np.zeros((2, 3, 8), np.float32)
    x = np.arange(48, dtype=np.float32).reshape(6, 8)
    y, v = computed(model, z=z, x=x, shape=np.array([9, 9, 9]))  # the old target is read no more
    assert np.array_equal(y, x.reshape(2, 3, 8))
    assert np.array_equal(v, -x.reshape(2, 3, 8))


LEFT = {
    "zero means zero": "g (float[B,8] x, int64[2] t) => (float[B,8] y) { y = Reshape<allowzero=1>(x, t) }",
    "an axis of length zero": "g (float[B,0] x, int64[2] t) => (float[B,0] y) { y = Reshape(x, t) }",
    "two unknown that no input has": "g (float[B,8] x, int64[3] t) => (float[P,Q,2] y) { y = Reshape(x, t) }",
    "a shape that is not known": """g (float[B,8] x, int64[2] t) => (float[B,8] y) {
        h = Reshape(x, t)
        y = Neg(h)
    }""",
}


@pytest.mark.parametrize("case", LEFT)
def test_a_target_that_cannot_be_said_otherwise_is_left(case: str) -> None:
    model = graph_of(LEFT[case])
    assert not reshapes_without_arithmetic(model)
    (node,) = (n for n in model.graph if n.op_type == "Reshape")
    assert node.inputs[1] is model.graph.inputs[1]


# ── cleaning and merging ─────────────────────────────────────────────────────────────


def test_cleaning_folds_constants_and_leaves_parameters() -> None:
    """2 · 3 is folded and x · w is not; the identity and what nobody reads go; equal constants become one."""
    model = graph_of("""g (float[2] x, float[2] w) => (float[2] y) {
        two = Constant<value: tensor = float[1] {2}>()
        three = Constant<value: tensor = float[1] {3}>()
        six = Mul(two, three)
        same = Constant<value: tensor = float[1] {6}>()
        scaled = Mul(x, w)
        passed = Identity(scaled)
        first = Mul(passed, six)
        unread = Neg(passed)
        y = Add(first, same)
    }""")
    given = {"x": np.array([1.0, -2.0], np.float32), "w": np.array([0.5, 3.0], np.float32)}
    wanted = np.array([9.0, -30.0], np.float32)  # x · w · 6 + 6
    assert np.array_equal(computed(model, **given)[0], wanted)
    assert clean(model) is model
    assert operators(model) == ["Mul", "Mul", "Add"]
    assert [v.name for v in model.graph.inputs] == ["x", "w"]
    (constant,) = (v.const_value for v in model.graph.initializers.values())
    assert constant is not None
    assert constant.numpy().tolist() == [6.0]
    assert np.array_equal(computed(model, **given)[0], wanted)


def test_cleaning_inlines_functions() -> None:
    text = "g (float[2] x) => (float[2] y) { y = local.twice_negated(x) }"
    function = '<domain: "local", opset_import: ["" : 23]> twice_negated (a) => (c) { b = Add(a, a) c = Neg(b) }'
    model = clean(graph_of(text, function, ', "local" : 1'))
    assert operators(model) == ["Add", "Neg"]
    assert not model.functions
    assert computed(model, x=np.array([1.0, 2.0], np.float32))[0].tolist() == [-2.0, -4.0]


def test_cleaning_folds_the_arithmetic_of_shapes() -> None:
    """The target [Shape(x)[0], 2, 4] of a Reshape whose result is written down as [B, 2, 4]."""
    model = graph_of("""g (float[B,8] x) => (float[B,2,4] y) {
        b = Shape<start=0, end=1>(x)
        rest = Constant<value_ints=[2, 4]>()
        t = Concat<axis=0>(b, rest)
        y = Reshape(x, t)
    }""")
    assert operators(clean(model)) == ["Reshape"]
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    assert np.array_equal(computed(model, x=x)[0], x.reshape(3, 2, 4))


def test_common_subexpressions_are_merged_and_others_kept() -> None:
    """The same operator on the same inputs is one; other inputs or attributes are others."""
    model = graph_of("""g (float[2,3] x, float[2,3] w) => (float[2,3] y, float[2,3] z) {
        a = Add(x, w)
        b = Add(x, w)
        c = Add(w, w)
        s = Softmax<axis=0>(a)
        t = Softmax<axis=1>(b)
        u = Softmax<axis=1>(a)
        y = Mul(s, t)
        v = Mul(u, c)
        z = Add(v, y)
    }""")
    given = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "w": np.ones((2, 3), np.float32)}
    before = computed(model, **given)
    assert deduplicate(model) is model
    assert operators(model) == ["Add", "Add", "Softmax", "Softmax", "Mul", "Mul", "Add"]
    assert all(np.array_equal(a, b) for a, b in zip(before, computed(model, **given), strict=True))


@pytest.mark.parametrize("rewrite", [clean, deduplicate, products_in_fp16, reshapes_without_arithmetic])
def test_a_second_time_changes_nothing(rewrite: Callable[[ir.Model], object]) -> None:
    model = graph_of("""g (float[B,8] x, float[8,8] w, int64[3] t) => (float[B,2,4] y) {
        a = MatMul(x, w)
        b = MatMul(x, w)
        c = Add(a, b)
        d = Identity(c)
        y = Reshape(d, t)
    }""")
    rewrite(model)
    once = operators(model), list(model.graph.initializers)
    rewrite(model)
    assert (operators(model), list(model.graph.initializers)) == once
