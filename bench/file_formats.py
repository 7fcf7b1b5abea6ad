"""What a file's format costs the demo model: ltx-demo written in each format and rendered from those files.

    python bench/file_formats.py [FORMAT …]

Quantized by comfy-kitchen (GGUF by gguf) and written as such files are published (tests/comfy_files.py). Each is
rendered by eager PyTorch, which widens the file's weights, and by ONNX Runtime on the graphs that engines for a card
are made of, which multiply the file's layers as they are or quantize them anew, as the card has the format or not
(docs/files.md). All stand beside the 16-bit checkpoint in eager fp32, with the same seeds: cosine of the latents at the
worst step, mean of the prompts, and PSNR of the frames. Results are written to bench/results/file-formats.json, with a
table and a contact sheet beside it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overcrank.cli.files import CARDS
from overcrank.engines.targets import BY_NAME
from overcrank.errors import present
from overcrank.export.files.parts import recipe_of_components, recipe_of_layers
from overcrank.export.quantization.recipe import Recipe
from overcrank.models import components, resolve
from overcrank.models.demo import clips
from overcrank.models.demo.evaluate import prompts
from overcrank.runtime.pipeline.load import load
from overcrank.runtime.pipeline.weights import module_of
from overcrank.runtime.sessions.stored_linear import StoredLinear
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "file-formats.json"
MODEL, STEPS, PROMPTS, COLUMNS = "ltx-demo", 12, 3, 4
FORMATS = (
    "fp8", "fp8-rows", "fp8-e5m2", "fp8-unscaled", "int8", "int8-rows", "convrot-64", "nvfp4", "mxfp8",
    "Q4_0", "Q5_0", "Q8_0", "mixed",
)  # fmt: skip
Rendered = tuple[np.ndarray, np.ndarray]
"""Latents [steps, prompts, values] and frames [prompts, frames, height, width, 3] from 0 to 1."""


def file_of(form: str, folder: Path) -> Path:
    """The demo's transformer in a file of this format."""
    from tests.comfy_files import GGUF, write
    from tests.original_names import LTX, Original

    module = load(MODEL, backend="eager", device="cpu").transformer
    original = Original(LTX, {n: tuple(p.shape) for n, p in module.named_parameters()})
    path = folder / f"{form}.{'gguf' if form in GGUF else 'safetensors'}"
    return write(path, module, original, form).path


def rendered(store: Path, file: Path | None = None, recipe: Recipe | None = None) -> Rendered:
    """By eager PyTorch; with a recipe, by ONNX Runtime."""
    how: dict[str, Any] = {"backend": "onnxruntime", "recipe": recipe, "precision": recipe.precision} if recipe else {}
    weights = {"transformer": file} if file else {}
    pipe = load(MODEL, device="cpu", store=store, weights=weights, **{"backend": "eager", **how})
    chosen = [prompt for prompt, _ in prompts()[:: len(prompts()) // PROMPTS]][:PROMPTS]
    latents: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].flatten(1).float())
        return tensors

    frames = pipe(
        chosen, height=clips.SIZE, width=clips.SIZE, num_frames=clips.FRAMES, frame_rate=clips.FPS,
        num_inference_steps=STEPS, guidance_scale=3.0, output_type="np", callback_on_step_end=keep,
        generator=[torch.Generator().manual_seed(i) for i in range(PROMPTS)],
    ).frames  # fmt: skip
    return torch.stack(latents).numpy(), np.asarray(frames)


def recipes(file: Path) -> dict[str, Recipe]:
    """Card → how its engines multiply the file's layers."""
    variant = resolve(MODEL)
    (component,) = components(variant, ("denoiser",))
    stored = module_of(file, component, torch.float32).named_modules()
    layers = {name: (own.format, own.rotation) for name, own in stored if isinstance(own, StoredLinear)}
    of_cards = {}
    for card, target in CARDS.items():
        own = recipe_of_layers(layers, component, BY_NAME[target].precisions)
        of_cards[card] = present(recipe_of_components({component.name: present(own, "rules")}, variant), "a recipe")
    return of_cards


def compared(found: Rendered, expected: Rendered) -> dict[str, float]:
    norms = np.linalg.norm(found[0], axis=2) * np.linalg.norm(expected[0], axis=2)
    cosines = (found[0] * expected[0]).sum(2) / norms
    error = float(((found[1] - expected[1]) ** 2).mean())
    return {
        "first_step": round(float(cosines[0].mean()), 6),
        "worst_step": round(float(cosines.mean(1).min()), 5),
        "worst_prompt": round(float(cosines.min()), 5),
        "psnr_db": round(float(10 * np.log10(1 / max(error, 1e-10))), 1),
    }


def sheet(rows: dict[str, np.ndarray]) -> Image.Image:
    """A row for each rendering: of each prompt, frames from first to last."""
    count, size = next(iter(rows.values())).shape[:2], clips.SIZE
    picked = np.linspace(0, count[1] - 1, COLUMNS).astype(int)
    width = 150 + count[0] * COLUMNS * (size + 2)
    image = Image.new("RGB", (width, len(rows) * (size + 4)), "white")
    draw = ImageDraw.Draw(image)
    for y, (name, frames) in enumerate(rows.items()):
        draw.text((4, y * (size + 4) + size // 2), name, "black")
        for x, frame in enumerate(frames[:, picked].reshape(-1, *frames.shape[2:])):
            picture = Image.fromarray((frame * 255).round().astype(np.uint8))
            image.paste(picture, (150 + x * (size + 2), y * (size + 4)))
    return image


def row(form: str, store: Path, expected: Rendered, frames: dict[str, np.ndarray]) -> dict[str, Any]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="overcrank-bench-") as folder:
        file = file_of(form, Path(folder))
        size, eager = file.stat().st_size, rendered(store, file)
        cards: dict[str, dict[str, Any]] = {}
        known: dict[str, dict[str, Any]] = {}
        for card, recipe in recipes(file).items():
            key = repr([(r.layers, r.format, r.rotation) for r in recipe.components["denoiser"].rules])
            if key not in known:
                made = rendered(store, file, recipe)
                frames[f"{form}, {card}"] = made[1]
                counts = Counter(rule.format for rule in recipe.components["denoiser"].rules)
                known[key] = {"layers": dict(counts), **compared(made, expected)}
            cards[card] = known[key]
    found = {"weights": compared(eager, expected), "cards": cards}
    return {"format": form, "file_mb": round(size / 1e6, 2), **found, "seconds": round(time.monotonic() - start)}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["# ltx-demo from files of each format", "", *(__doc__ or "").strip().splitlines()[2:], ""]
    lines += [f"| | weights alone | {' | '.join(CARDS)} |", f"|{'---|' * (len(CARDS) + 2)}"]
    for r in rows:
        ways = [r["weights"], *(r["cards"][card] for card in CARDS)]
        cells = [f"{' and '.join(w.get('layers', {}))} {w['worst_step']:.4f}, {w['psnr_db']} dB".strip() for w in ways]
        lines.append(f"| {r['format']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    sys.path.insert(0, str(ROOT))
    known = json.loads(RESULTS.read_text("utf-8"))["rows"] if RESULTS.is_file() else []
    done = {r["format"]: r for r in known}
    sheets: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory(prefix="overcrank-bench-") as folder:
        store = Path(folder)
        expected = rendered(store)
        sheets["16 bit"] = expected[1]
        for form in sys.argv[1:] or FORMATS:
            done[form] = row(form, store, expected, sheets)
            print(json.dumps(done[form]), flush=True)
            ordered = [done[f] for f in FORMATS if f in done]
            about = {"command": "python bench/file_formats.py", "date": datetime.now(UTC).date().isoformat()}
            RESULTS.write_text(json.dumps({**about, "rows": ordered}, indent=1) + "\n", "utf-8")
            RESULTS.with_suffix(".md").write_text(table(ordered), "utf-8")
            sheet(sheets).save(RESULTS.with_suffix(".jpg"), quality=85)


if __name__ == "__main__":
    main()
