"""Attention in fp8: the graph's, and the same arithmetic and ranges in PyTorch.

Quantized inputs of ONNX's Attention compile to a 16-bit kernel. Written out as MatMul, Softmax,
MatMul, with query, key, value *and* probabilities quantized by constant steps, it is one fused
kernel on fp8 operands, and factors that are inputs fuse into it (docs/adr/0007):

    softmax(Q(query · query_before) · Q(key · key_before)ᵀ · size · scores + mask)
    Q(that) · Q(value · value_before) · value_behind
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from overcrank.errors import present
from overcrank.export.quantization.formats import NUMBERS, Packed, Rewriting
from overcrank.export.quantization.recipe import OPERANDS, ActivationRange

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor, nn

FACTORS = ("query_before", "key_before", "scores", "value_before", "value_behind")
PROBABILITIES = 2.0**-8
"""Constant step of the softmax's output, which is at most 1: e4m3 has 256, and subnormals down to 2^-17."""
STEP = 2.0**-3
"""Of query, key and value: factors and sums then stay far from fp16's end, measured or not."""
FP8 = NUMBERS["fp8"]
FEWEST_TOKENS = 32
"""Where a profile allows fewer, TensorRT for RTX 1.7.1 does not fuse it (read from plans)."""

ShapeRange = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, best-served and largest shape of a graph input."""


@dataclass(frozen=True)
class Attention:
    """A self-attention, by the name of the module it is computed in ("transformer_blocks.0.attn1")."""

    name: str
    node: ir.Node
    tokens: str
    """Their number, in symbols of the graph ("s21 + s24")."""


def attentions(model: ir.Model) -> Iterator[Attention]:
    """Those that can be in fp8: over the query's own tokens, with a mask that is added, or none."""
    for node in model.graph:
        if node.op_type != "Attention" or node.attributes.get_int("is_causal"):
            continue
        query, key = (present(x, "an input of an attention") for x in node.inputs[:2])
        shape, other = (present(x.shape, "the shape of an attention's input") for x in (query, key))
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if shape[1:3] != other[1:3] or (mask is not None and mask.dtype != query.dtype):
            continue
        if name := _module_of(node.inputs[2]):
            yield Attention(name, node, str(shape[2]))


def fusable(model: ir.Model, ranges: Mapping[str, ShapeRange]) -> Iterator[Attention]:
    """Those whose kernel is fused where inputs are within `ranges`; another would write its scores out."""
    import sympy

    least: dict[Any, Any] = {}
    for value in model.graph.inputs:
        for dim, low in zip(value.shape or (), ranges.get(str(value.name), ((),))[0], strict=False):
            size = sympy.sympify(str(dim))
            for symbol in size.free_symbols:  # one; the exporter writes "s9" or "8*s9"
                least[symbol] = low / size.coeff(symbol)
    for attention in attentions(model):
        if sympy.sympify(attention.tokens).subs(least) >= FEWEST_TOKENS:
            yield attention


def _module_of(value: ir.Value | None) -> str:
    """The module whose linear layer made the value: the nearest above it in the graph."""
    waiting, seen = [value], set()
    while waiting:
        node = source.producer() if (source := waiting.pop(0)) is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        moved = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] else None
        if moved is not None and moved.inputs[0] is not None and moved.inputs[0].is_graph_input():
            return str(moved.inputs[0].name).rpartition(".")[0].rpartition(".")[0]
        waiting += node.inputs
    return ""


def in_fp8(model: ir.Model, names: Collection[str]) -> list[Packed]:
    """Write the attentions of these names out in fp8, in place; returns the inputs that the pack fills."""
    same: dict[str, list[ir.Node]] = {}
    for attention in list(attentions(model)):
        if attention.name in names:
            same.setdefault(attention.name, []).append(attention.node)
    packed: list[Packed] = []
    for name, nodes in same.items():
        query = present(nodes[0].inputs[0], "an attention's query")
        rewriting = _Rewriting(model.graph, name, FP8, present(query.dtype, "the type of an attention's query"))
        for i, node in enumerate(nodes):
            rewriting.one(node, f"{name}/{i}" if i else name)
        packed += rewriting.packed
    return packed


class _Rewriting(Rewriting):
    def one(self, node: ir.Node, called: str) -> None:
        """`called` names the softmax in the plan, where the lint looks for it."""
        if not self.packed:
            self.factors = {role: self.input(role, self.compute, (1, 1, 1, 1)) for role in FACTORS}
        self.at = node
        width = present(present(node.inputs[0], "an attention's query").shape, "the shape of an attention's query")[3]
        size = node.attributes.get_float("scale", 0.0) or int(str(width)) ** -0.5
        q, k, v = (self._operand(x, name) for x, name in zip(node.inputs, OPERANDS, strict=False))
        scores = self.node("MatMul", q, self.node("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.node("Mul", scores, self.constant(f"quant_size_{size:.6g}", size))
        scores = self.node("Mul", scores, self.factors["scores"])
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            scores = self.node("Add", scores, node.inputs[3])
        likely = self.node("Softmax", scores, axis=-1)
        self.last_node.name = called
        likely = self.rounded(likely, self.constant("quant_step_probabilities", PROBABILITIES))
        y = self.node("Mul", self.node("MatMul", likely, v), self.factors["value_behind"])
        self.replace(node, y)

    def _operand(self, x: ir.Value | None, name: str) -> ir.Value:
        scaled = self.node("Mul", present(x, "an input of an attention"), self.factors[f"{name}_before"])
        return self.rounded(scaled, self.constant("quant_step_attention", STEP))


# ── the same in PyTorch ──────────────────────────────────────────────────────────────


def packed_factors(name: str, ranges: Mapping[str, ActivationRange], compute: str) -> dict[str, Tensor]:
    """Role → factor [1, 1, 1, 1], powers of two; an operand without a range may be as large as e4m3's 448."""
    import torch

    def before(operand: str) -> float:
        operand_range = ranges.get(f"{name}.{operand}")
        return 2.0 ** math.floor(math.log2(STEP * FP8.largest / (operand_range.amax if operand_range else FP8.largest)))

    query, key, value = (before(operand) for operand in OPERANDS)
    values = (query, key, 1 / (query * key), value, 1 / value)
    return {
        role: torch.full((1, 1, 1, 1), v, dtype=getattr(torch, compute))
        for role, v in zip(FACTORS, values, strict=True)
    }


def attended(
    query: Tensor, key: Tensor, value: Tensor, call: Mapping[str, Any], packed: Mapping[str, Tensor]
) -> Tensor:
    """scaled_dot_product_attention of [B, H, S, D] as the rewritten graph computes it, in fp32.

    `call`: its keywords; `packed`: the factors.
    """
    import torch

    def rounded(x: Tensor, step: float) -> Tensor:
        return (x / step).clamp(-FP8.largest, FP8.largest).to(torch.float8_e4m3fn).float() * step

    factors = {role: tensor.float().to(query.device) for role, tensor in packed.items()}
    q, k, v = (
        rounded(x.float() * factors[f"{name}_before"], STEP)
        for x, name in zip((query, key, value), OPERANDS, strict=True)
    )
    size = torch.tensor(call.get("scale") or query.shape[-1] ** -0.5).to(packed["scores"].dtype).float()
    scores = q @ k.transpose(-1, -2) * size.to(query.device) * factors["scores"]
    mask = call.get("attn_mask")
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    out: Tensor = (rounded(scores.softmax(-1), PROBABILITIES) @ v * factors["value_behind"]).to(query.dtype)
    return out


Handler = Callable[[str, "Tensor", "Tensor", "Tensor", dict[str, Any]], "Tensor | None"]
"""Called with an attention's name, query, key, value and keywords; what it returns, if not None, is the outcome."""


@contextmanager
def intercepted(module: nn.Module, names: Collection[str], handle: Handler) -> Iterator[None]:
    """Meanwhile every scaled_dot_product_attention within the submodules of these names is shown to `handle`."""
    import torch
    from torch.overrides import TorchFunctionMode

    stock = torch.nn.functional.scaled_dot_product_attention
    within: list[str] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is stock and within:
                arguments = dict(zip((*OPERANDS, "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
                query, key, value = (arguments.pop(operand) for operand in OPERANDS)
                result = handle(within[-1], query, key, value, arguments)
                if result is not None:
                    return result
            return func(*args, **kwargs)

    with ExitStack() as hooks:
        for name in names:
            part = module.get_submodule(name)
            for handle_of in (
                part.register_forward_pre_hook(lambda *_, name=name: within.append(name)),
                part.register_forward_hook(lambda *_: within.pop() and None, always_call=True),
            ):
                hooks.callback(handle_of.remove)
        with Mode():
            yield
