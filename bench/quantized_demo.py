"""What quantization costs the demo model: held-out prompts judged, and how far from eager fp32 each way is.

    python bench/quantized_demo.py [WAY …]

Every way renders the 72 held-out prompts of models/demo/evaluate.py with the same seeds; the quantized ones in ONNX
Runtime on the Q/DQ graphs that engines are made of. "one random call" has its ranges from a single call on random
tensors instead of a calibration. Results are added to bench/results/quantized-demo.json and written as a table
beside it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overcrank.calibration.run import calibrate, layout_of
from overcrank.engines.store import Store
from overcrank.export.quantization.recipe import IN_16_BIT, LayerFormat, Recipe, Rule, default_recipe
from overcrank.export.quantization.reference import ranges_of_call
from overcrank.models import components, resolve
from overcrank.models.demo.evaluate import Trial, prompts, scores, trials
from overcrank.runtime.pipeline.load import load
from skimage.metrics import peak_signal_noise_ratio

RESULTS = Path(__file__).parent / "results" / "quantized-demo.json"
MODEL = "ltx-demo"
SAMPLES = 16
Rendered = tuple[list[Trial], np.ndarray]


@dataclass(frozen=True)
class Way:
    form: LayerFormat = IN_16_BIT
    method: str = ""  # of calibration; "random" is one call on random tensors
    dtype: torch.dtype = torch.float32
    attention: bool = True  # whether the recipe may quantize it


WAYS = {
    "eager fp32": Way(),
    "eager bf16": Way(dtype=torch.bfloat16),
    "fp8": Way(LayerFormat("fp8", "static"), "max"),
    "fp8, attention in 16 bit": Way(LayerFormat("fp8", "static"), "max", attention=False),
    "fp8, one random call": Way(LayerFormat("fp8", "static"), "random"),
    "fp8, dynamic": Way(LayerFormat("fp8", "dynamic")),
    "fp8, weights only": Way(LayerFormat("fp8", "16bit")),
    "int8": Way(LayerFormat("int8", "static"), "max"),
    "int8, SmoothQuant": Way(LayerFormat("int8", "static"), "smoothquant"),
    "int8, percentile": Way(LayerFormat("int8", "static"), "percentile"),
    "int8, one random call": Way(LayerFormat("int8", "static"), "random"),
    "int8, dynamic": Way(LayerFormat("int8", "dynamic")),
    "int8, weights only": Way(LayerFormat("int8", "16bit")),
    "nvfp4": Way(LayerFormat("nvfp4", "static"), "max"),
    "nvfp4, dynamic": Way(LayerFormat("nvfp4", "dynamic")),
}


def recipe_for(way: Way, store: Path) -> Recipe | None:
    if not way.method:
        return None
    if way.method != "random":
        out = store / "recipe.json"
        asked = {"precision": way.form.format, "method": way.method, "samples": SAMPLES, "device": "cpu"}
        made = calibrate(MODEL, store=store, out=out, **asked)
        return made if way.attention else _without_attention(made)
    (component,) = components(resolve(MODEL), ("denoiser",))
    recipe = default_recipe(component, way.form)
    module = load(MODEL, backend="eager", device="cpu").transformer
    sizes = {**component.free_axes, **component.trace_sizes}
    with torch.no_grad():
        call = component.sample(module, sizes, torch.Generator().manual_seed(0))
        ranges = ranges_of_call(module, layout_of(component, recipe, Store(store)), call)
    known = recipe.model_copy(update={"ranges": {"transformer": ranges}})
    return Recipe(model=MODEL, precision=way.form.format, components={"denoiser": known})


def _without_attention(recipe: Recipe) -> Recipe:
    kept = Rule(layers="*.attn?", format="16bit", reason="to compare")
    own = {n: c.model_copy(update={"rules": [kept, *c.rules]}) for n, c in recipe.components.items()}
    return recipe.model_copy(update={"components": own})


def rendered(way: Way, store: Path) -> Rendered:
    if way.form == IN_16_BIT:
        pipe = load(MODEL, backend="eager", device="cpu", dtype=way.dtype, store=store)
    else:
        layers = {"precision": way.form.format, "activations": way.form.activations, "recipe": recipe_for(way, store)}
        pipe = load(MODEL, backend="onnxruntime", device="cpu", store=store, **layers)
    return recorded(pipe)


def recorded(pipe: Any, stepped: Callable[[int, int], None] = lambda step, steps: None, batch: int = 8) -> Rendered:
    """Trials of a pipeline, and latents [steps, prompts, values]; `stepped` is told of each step's end."""
    kept: list[list[torch.Tensor]] = []

    def keep(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        stepped(step, pipe.num_timesteps)
        if step == 0:
            kept.append([])
        kept[-1].append(tensors["latents"].flatten(1).float())
        return tensors

    done = trials(partial(pipe, callback_on_step_end=keep), prompts(), batch)
    return done, torch.cat([torch.stack(steps) for steps in kept], dim=1).numpy()


def row(name: str, store: Path, reference: Rendered) -> dict[str, Any]:
    start = time.monotonic()
    figures = compared(reference if name == "eager fp32" else rendered(WAYS[name], store), reference)
    seconds = round(time.monotonic() - start)
    return {"way": name, **figures, "seconds": seconds, **when()}


def compared(made: Rendered, reference: Rendered) -> dict[str, Any]:
    """How the trials were judged, and how far they are from the reference's."""
    done, latents = made
    exact, expected = reference
    norms = np.linalg.norm(latents, axis=2) * np.linalg.norm(expected, axis=2)
    cosines = (latents * expected).sum(2) / norms
    psnr = [
        100.0 if (a.frames == b.frames).all() else peak_signal_noise_ratio(b.frames, a.frames, data_range=1)
        for a, b in zip(done, exact, strict=True)
    ]
    return {
        "scores": {k: round(v, 4) for k, v in scores(done).items()},
        "same_verdict": sum(a.verdict == b.verdict for a, b in zip(done, exact, strict=True)),
        "prompts": len(done),
        "lowest_mean_cosine": round(float(cosines.mean(1).min()), 5),
        "lowest_cosine": round(float(cosines.min()), 5),
        "psnr_db": round(float(np.mean(psnr)), 2),
    }


def when() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {n: metadata.version(n) for n in ("torch", "diffusers", "onnxruntime-gpu", "nvidia-modelopt")},
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["# ltx-demo quantized", "", *(__doc__ or "").strip().splitlines()[2:], ""]
    lines += ["| | colour | shape | motion | same verdict | cosine, worst step | worst prompt of it | PSNR |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for r in rows:
        right = " | ".join(f"{r['scores'][a]:.1%}" for a in ("colour", "shape", "motion"))
        psnr = "" if r["way"] == "eager fp32" else f"{r['psnr_db']:.1f} dB"
        same = f"{r['same_verdict']} of {r['prompts']}"
        lines.append(f"| {r['way']} | {right} | {same} | {r['lowest_mean_cosine']} | {r['lowest_cosine']} | {psnr} |")
    return "\n".join([*lines, ""])


def main() -> None:
    known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else []
    rows = {r["way"]: r for r in known}
    with tempfile.TemporaryDirectory(prefix="overcrank-bench-") as folder:
        store = Path(folder)
        reference = rendered(WAYS["eager fp32"], store)
        for name in sys.argv[1:] or WAYS:
            rows[name] = row(name, store, reference)
            print(json.dumps(rows[name]), flush=True)
            ordered = [rows[n] for n in WAYS if n in rows]
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")
            RESULTS.with_suffix(".md").write_text(table(ordered), "utf-8")


if __name__ == "__main__":
    main()
