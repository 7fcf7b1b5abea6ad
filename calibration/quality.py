"""`overcrank verify --report`: what a quantized bundle costs in quality, beside what 16 bit and another seed do.

The bundle's recipe renders in ONNX Runtime in fp32, so that its difference from eager fp32 is
quantization alone; eager bf16 against eager fp32 is the noise floor, another seed the ceiling.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from overcrank.engines.build import RECIPE
from overcrank.engines.manifest import Manifest, read_manifest
from overcrank.errors import UserError
from overcrank.export.quantization.attention import attended, intercepted, packed_factors
from overcrank.export.quantization.packing import packed_layer
from overcrank.export.quantization.recipe import ATTENTION, ActivationRange, LayerFormat, Recipe, read_recipe
from overcrank.export.quantization.reference import multiplied
from overcrank.options import option
from overcrank.runtime.pipeline.accelerate import main_module
from overcrank.runtime.render.output import Video
from overcrank.runtime.render.request import RenderRequest
from overcrank.runtime.sessions.parameters import compute_of

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Difference:
    """Of two ways to render the same prompts, over all of them."""

    name: str
    against: str
    cosines: list[float]
    """Of the latents after each step: the lowest of any prompt."""
    psnr: float
    """Of the frames in dB, mean over prompts."""
    ssim: float


@dataclass(frozen=True)
class Report:
    model: str
    precision: str
    prompts: list[str]
    differences: list[Difference]
    layers: dict[str, float]
    """Layer → relative error of its output on its own input, at the middle step of the first prompt."""


def quality_report(bundle: Path, weights: Path, requests: list[RenderRequest], folder: Path) -> Report:
    """Render `requests` four ways, write report.md, report.json and pictures to `folder`, return the figures.

    `weights`: the diffusers checkpoint. Raises UserError for a bundle that is not quantized.
    """
    import torch
    from overcrank.runtime.pipeline.load import load

    manifest = read_manifest(bundle)
    formats, compute = _formats(manifest)
    recipe = read_recipe(bundle / RECIPE) if (bundle / RECIPE).is_file() else None
    name = manifest.precision
    pipe = load(str(weights), backend="eager", device="cpu", dtype=torch.float32)
    ranges = _ranges(recipe, manifest)
    middle = (requests[0].steps or 1) // 2
    with layer_errors(main_module(pipe), formats, ranges, compute, middle) as errors:
        exact = videos(pipe, requests)
    other = videos(pipe, [r.model_copy(update={"seed": r.seed + 10_000}) for r in requests])
    half = videos(load(str(weights), backend="eager", device="cpu", dtype=torch.bfloat16), requests)
    layers: dict[str, Any] = {"precision": name, "activations": _activations(manifest, formats), "recipe": recipe}
    quantized = videos(load(str(weights), backend="onnxruntime", device="cpu", dtype=torch.float32, **layers), requests)
    runs = {name: quantized, "eager bf16": half, "eager fp32": exact, "another seed": other}
    pairs = ((name, "eager fp32"), (name, "eager bf16"), ("eager bf16", "eager fp32"), ("another seed", "eager fp32"))
    differences = [difference(a, runs[a], b, runs[b]) for a, b in pairs]
    report = Report(manifest.model, name, [r.prompt for r in requests], differences, dict(errors))
    _write(report, runs, folder)
    return report


def _formats(manifest: Manifest) -> tuple[dict[str, LayerFormat], str]:
    for entry in manifest.components:
        if entry.formats:
            return entry.formats, compute_of(entry)
    raise UserError(
        f"{option('report')} is for quantized bundles, and this one is {manifest.precision}; verify it without."
    )


def _activations(manifest: Manifest, formats: Mapping[str, LayerFormat]) -> str:
    return next((form.activations for form in formats.values() if form.format == manifest.precision), "dynamic")


def _ranges(recipe: Recipe | None, manifest: Manifest) -> Mapping[str, ActivationRange]:
    for entry in manifest.components:
        if recipe is not None and entry.name in recipe.components:
            return recipe.components[entry.name].ranges.get(entry.subfolder, {})
    return {}


def videos(pipe: Any, requests: Sequence[RenderRequest]) -> list[Video]:
    """Rendered in memory, one after the other."""
    from overcrank.runtime.render.renderer import Renderer, Silent

    driver = Renderer(pipe, pipe.overcrank.variant.name, Silent(), lanes=1)
    return [driver.video(request) for request in requests]


@contextmanager
def layer_errors(
    module: nn.Module, formats: Mapping[str, LayerFormat], ranges: Mapping[str, ActivationRange], compute: str, at: int
) -> Iterator[dict[str, float]]:
    """Collects, at call `at` of the module, how far each quantized layer's output is from its own, relative in norm."""
    import torch

    errors: dict[str, float] = {}
    calls = -1

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def compare(name: str) -> Any:
        def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if calls != at:
                return
            packed = packed_layer(name, layer.weight.detach(), formats[name], ranges.get(name), compute)
            own = output if layer.bias is None else output - layer.bias
            note(name, multiplied(inputs[0], packed, formats[name]), own)

        return hook

    def note(name: str, quantized: Tensor, own: Tensor) -> None:
        errors[name] = round(float((quantized - own).norm() / own.norm().clamp_min(1e-12)), 6)

    def attend(name: str, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]) -> None:
        if calls == at:
            own = torch.nn.functional.scaled_dot_product_attention(query, key, value, **call)
            note(name, attended(query, key, value, call, packed_factors(name, ranges, compute)), own)

    handles = [module.register_forward_pre_hook(count)]
    linear = [name for name, form in formats.items() if form.kind != ATTENTION]
    handles += [module.get_submodule(name).register_forward_hook(compare(name)) for name in linear]
    try:
        with intercepted(module, formats.keys() - set(linear), attend):
            yield errors
    finally:
        for handle in handles:
            handle.remove()


def difference(name: str, rendered: Sequence[Video], against: str, references: Sequence[Video]) -> Difference:
    """Of the same requests, rendered two ways."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    cosines, psnr, ssim = [], [], []
    for video, reference in zip(rendered, references, strict=True):
        a, b = (v.latents.reshape(len(v.latents), -1).astype(np.float64) for v in (video, reference))
        cosines.append((a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30))
        same = bool((video.frames == reference.frames).all())
        psnr.append(100.0 if same else peak_signal_noise_ratio(reference.frames, video.frames))
        pairs = zip(reference.frames, video.frames, strict=True)
        ssim.append(np.mean([structural_similarity(r, v, channel_axis=-1) for r, v in pairs]))
    lowest = [round(float(c), 6) for c in np.min(cosines, axis=0)]
    return Difference(name, against, lowest, round(float(np.mean(psnr)), 2), round(float(np.mean(ssim)), 4))


# ── the written report ───────────────────────────────────────────────────────────────


def _write(report: Report, runs: Mapping[str, list[Video]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _plot_steps(report, folder / "steps.png")
    _plot_layers(report, folder / "layers.png")
    _plot_frames(report, runs, folder / "frames.png")
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=1), "utf-8")
    (folder / "report.md").write_text(markdown(report), "utf-8")


def markdown(report: Report) -> str:
    lines = [
        f"# {report.model} in {report.precision}",
        "",
        f"{len(report.prompts)} prompts, the same seeds each way.",
        "",
    ]
    lines += ["| | against | lowest cosine of a step | PSNR of frames | SSIM |", "|---|---|---|---|---|"]
    for d in report.differences:
        lines.append(f"| {d.name} | {d.against} | {min(d.cosines):.5f} | {d.psnr:.1f} dB | {d.ssim:.3f} |")
    lines += ["", "![cosine by step](steps.png)", "", "## Layers by error", "", "![layers](layers.png)", ""]
    lines += ["| layer | relative error of its output |", "|---|---|"]
    ranked = sorted(report.layers.items(), key=lambda item: -item[1])
    lines += [f"| {name} | {error:.4f} |" for name, error in ranked[:20]]
    lines += [
        "",
        "## Frames",
        "",
        "![frames](frames.png)",
        "",
        *(f"{i}. {p}" for i, p in enumerate(report.prompts, 1)),
        "",
    ]
    return "\n".join(lines)


def _plot_steps(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for d in report.differences:
        steps = np.arange(1, len(d.cosines) + 1)
        axes.semilogy(steps, np.maximum(1 - np.array(d.cosines), 1e-9), marker=".", label=f"{d.name} / {d.against}")
    axes.set(xlabel="denoising step", ylabel="1 − cosine of latents", title=f"{report.model} in {report.precision}")
    axes.legend()
    figure.savefig(path, dpi=110)


def _plot_layers(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7, 0.12 * len(report.layers)), 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(report.layers)), list(report.layers.values()))
    axes.set(xlabel="quantized layer, in order", ylabel="relative error of output", title="each layer on its own input")
    figure.savefig(path, dpi=110)


def _plot_frames(report: Report, runs: Mapping[str, list[Video]], path: Path) -> None:
    """First, middle and last frame of up to four prompts, each way of rendering in a row."""
    from matplotlib.figure import Figure

    count = min(4, len(report.prompts))
    figure = Figure(figsize=(3.6 * count, 1.35 * len(runs)), layout="constrained")
    grid = figure.subplots(len(runs), 3 * count, squeeze=False)
    for row, (name, videos) in zip(grid, runs.items(), strict=True):
        for i, axes in enumerate(row):
            frames = videos[i // 3].frames
            axes.imshow(frames[(0, len(frames) // 2, -1)[i % 3]])
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=110)
