"""Read an engine without a GPU: which kernels it launches and what they do to the weights.

A TensorRT-RTX plan holds, as text, the program it runs: one instruction per launch, with the
names of the tensors it reads. `function` is a generated kernel named after the operations
it fuses (`__myl_CastMulMean…`), `runtime_fusion` a GEMM with its epilogue
(`__myl_FcAddMulAdd`), `fully_connected` a GEMM, `corrltn` a convolution. The GEMM inside a
`runtime_fusion` is listed a second time, as the fusion's body.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from overcrank.export.quantization.formats import ROTATION

_INSTRUCTION = re.compile(
    rb'^ {1,4}(function|runtime_fusion|fully_connected|corrltn)=\{ name="?([^\s"]+)"?([^\n]*)', re.M
)
_TYPED = re.compile(rb'^ +(?:sub_)?tensor=\{[^\n]*? name="([^"]+)"[^\n]*? type=([a-z0-9_]+)', re.M)
_OPERANDS = re.compile(rb"\binput=\{([^}]*)\}")
_READS = re.compile(rb"\binput_args=\{([^}]*)\}")
_NAME = re.compile(rb'"([^"]+)"')
_OPERATION = re.compile(r"[A-Z][a-z]+")
_MOVES = {"Tran", "Move", "Cast", "Resh", "Copy", "Repl"}
_LAYERS = re.compile(rb'layers="([^"]*)"')
_FORMATS = {b"fp8_e4m3": "fp8", b"int8": "int8", b"fp4_e2m1": "nvfp4"}
_INTERNAL = ("proxy__", "__mye", "__myln", "__scratch")


UNKNOWN = "plan not in a form this reader knows; nothing is claimed about its kernels"


@dataclass(frozen=True)
class PlanCounts:
    """How often a plan does what, in a call."""

    kernels: int  # generated ones; GEMMs, convolutions and attentions come on top
    gemms: int
    fused_gemms: int  # of them, those with a fused epilogue
    convolutions: int
    attentions: int
    gemm_formats: dict[str, int]  # "fp8", "int8", "nvfp4" → GEMMs in it
    weight_formats: dict[str, int]  # the same → GEMMs in 16 bit on weights in it
    attention_formats: dict[str, int]  # other than 16 bit
    weights_moved: dict[str, int]  # "transposed", "cast", "copied" → weights, at every call
    rotations: int = 0  # of `gemms`, those that rotate the input of quantized layers, and multiply no weight

    def verdict(self) -> str:
        """One line for people."""
        parts = [f"{self.kernels} generated kernels"]
        if self.gemms:
            plain = self.gemms - self.fused_gemms
            parts.append(f"{self.gemms} GEMMs ({self.fused_gemms} with fused epilogue, {plain} without)")
        if self.rotations:
            parts.append(f"{self.rotations} of them rotations")
        if self.convolutions:
            parts.append(f"{self.convolutions} convolutions")
        if self.attentions:
            parts.append(f"{self.attentions} fused attentions")
        parts += [f"{count} GEMMs in {name}" for name, count in self.gemm_formats.items()]
        parts += [f"{count} GEMMs in 16 bit on {name} weights" for name, count in self.weight_formats.items()]
        parts += [f"{count} attentions in {name}" for name, count in self.attention_formats.items()]
        moved = ", ".join(f"{count} weights {kind} at every call" for kind, count in self.weights_moved.items())
        return f"{', '.join(parts)}; {moved or 'no weight transposed, cast or moved'}"


@dataclass(frozen=True)
class PlanReport:
    """What a plan does per call. `known` is False for a plan this reader cannot vouch for."""

    known: bool
    kernels: int = 0  # generated ones; GEMMs, convolutions and attentions come on top
    epilogues: Counter[str] = field(default_factory=Counter)  # fused behind a GEMM → how often
    gemms: int = 0
    linears: int = 0  # matrix products of the graph; more than `gemms` where some are merged
    convolutions: int = 0
    attentions: int = 0
    weight_moves: tuple[tuple[str, str], ...] = ()  # (kernel, parameter)
    formats: dict[str, str] = field(default_factory=dict)  # graph node of a product → "fp8", "int8", "nvfp4"
    dequantized: frozenset[str] = frozenset()  # those of them that widen their weight on the way in
    attention_formats: Counter[str] = field(default_factory=Counter)  # other than 16 bit
    attended: dict[str, str] = field(default_factory=dict)  # graph node inside such an attention → its format
    rotations: tuple[str, ...] = ()  # products that rotate the input of quantized layers, as they are named in the plan

    def counts(self) -> PlanCounts | None:
        """None for a plan that is not known."""
        if not self.known:
            return None
        multiplied = self.formats.keys() - self.dequantized
        return PlanCounts(
            kernels=self.kernels,
            gemms=self.gemms,
            fused_gemms=self.epilogues.total(),
            convolutions=self.convolutions,
            attentions=self.attentions,
            gemm_formats=_sorted(self.formats[n] for n in multiplied),
            weight_formats=_sorted(self.formats[n] for n in self.dequantized),
            attention_formats=_sorted(self.attention_formats.elements()),
            weights_moved=_sorted(_kind(kernel) for kernel, _ in self.weight_moves),
            rotations=len(self.rotations),
        )

    def verdict(self) -> str:
        """One line for people."""
        counts = self.counts()
        return counts.verdict() if counts else UNKNOWN

    def lost(self, embedded: PlanReport) -> Counter[str]:
        """GEMM epilogues that the embedded plan fuses and this one does not."""
        return embedded.epilogues - self.epilogues

    def difference(self, embedded: PlanReport) -> str:
        """One line: what constant weights would have gained."""
        if not (self.known and embedded.known):
            return "cannot be compared: a plan is not in a known form"
        lost, more = self.lost(embedded), embedded.lost(self)
        merged = (embedded.linears - embedded.gemms) - (self.linears - self.gemms)
        parts = [f"{n} × GEMM+{e} only when embedded" for e, n in lost.items()]
        parts += [f"{n} × GEMM+{e} only with weights as inputs" for e, n in more.items()]
        if merged:
            parts.append(f"{merged} projections merged into a neighbour's GEMM only when embedded")
        return "; ".join(parts) or "the same GEMM kernels"


def read_plan(engine: Path | bytes, parameters: Collection[str]) -> PlanReport:
    """Report on a plan; `parameters` are the names of the network's weight inputs."""
    data = engine.read_bytes() if isinstance(engine, Path) else engine
    epilogues: Counter[str] = Counter()
    products: set[str] = set()
    convolutions: set[str] = set()
    moves: list[tuple[str, str]] = []
    weights = set(parameters)
    types = {m[1]: m[2] for m in _TYPED.finditer(data)}
    formats: dict[str, str] = {}
    dequantized: set[str] = set()
    attention_formats: Counter[str] = Counter()
    attended: dict[str, str] = {}
    kernels = attentions = 0
    for match in _INSTRUCTION.finditer(data):
        kind, name = match[1].decode(), match[2].decode()
        if kind == "runtime_fusion":
            before, _, behind = name.removeprefix("__myl_").partition("Fc")
            if behind:
                epilogues[behind] += 1
            if before and (widened := _narrow(match[3], _READS, types)):
                layers = dict.fromkeys(_layers(data, match.start()), widened)
                formats |= layers
                dequantized |= layers.keys()
        elif kind == "fully_connected":
            products.add(name)
            if multiplied := _narrow(match[3], _OPERANDS, types, both=True):
                formats |= dict.fromkeys(name.split("+"), multiplied)
        elif kind == "corrltn":
            convolutions.add(name)
        elif "mha" in name:
            attentions += 1
            if operands := _narrow(match[3], _READS, types):
                attention_formats[operands] += 1
                attended |= dict.fromkeys(_layers(data, match.start()), operands)
        else:
            kernels += 1
            if set(_OPERATION.findall(name)) <= _MOVES:
                tensors = _reads(match[3])
                moves += [(name, r) for r in tensors] if tensors and set(tensors) <= weights else []
    if not (kernels or products):
        return PlanReport(known=False)
    multiplied_by = {n for product in products for n in product.split("+")}
    return PlanReport(
        known=True,
        kernels=kernels,
        epilogues=epilogues,
        gemms=len(products),
        linears=sum(1 + name.count("+") for name in products),
        convolutions=len(convolutions),
        attentions=attentions,
        weight_moves=tuple(moves),
        formats={n: f for n, f in formats.items() if n in multiplied_by},
        dequantized=frozenset(dequantized & multiplied_by),
        attention_formats=attention_formats,
        attended=attended,
        rotations=tuple(sorted(name for name in products if name.startswith(ROTATION))),
    )


def _narrow(rest: bytes, group: re.Pattern[bytes], types: dict[bytes, bytes], both: bool = False) -> str:
    """The quantized format an instruction reads; with `both`, that of its first two operands alike."""
    match = group.search(rest)
    dtypes = [types.get(n, b"") for n in _NAME.findall(match[1])] if match else []
    if both:
        return _FORMATS.get(dtypes[0], "") if len(dtypes) > 1 and dtypes[0] == dtypes[1] else ""
    return next((_FORMATS[t] for t in dtypes if t in _FORMATS), "")


def _layers(data: bytes, start: int) -> list[str]:
    """Graph nodes that an instruction stands for."""
    match = _LAYERS.search(data, start)
    return [n.decode() for n in re.findall(rb"\[ONNX Layer: ([^\]]+)\]", match[1])] if match else []


def _reads(rest: bytes) -> list[str]:
    """Named tensors an instruction reads, without the compiler's own shape scalars."""
    match = _READS.search(rest)
    names = [n.decode() for n in _NAME.findall(match[1])] if match else []
    return [re.sub(r"\.\d+$", "", n) for n in names if not n.startswith(_INTERNAL)]


def _sorted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _kind(kernel: str) -> str:
    return "transposed" if "Tran" in kernel else "cast" if "Cast" in kernel else "copied"
