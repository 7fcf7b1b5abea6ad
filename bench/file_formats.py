"""What a file's format costs the demo model: ltx-demo written in each format and rendered from those files.

    python bench/file_formats.py [FORMAT …]

Quantized by comfy-kitchen (GGUF by gguf) and written as such files are published (tests/comfy_files.py). Each is
rendered twice: by eager PyTorch, which widens the file's weights, and by ONNX Runtime on the graph that engines are
made of, which multiplies as a card does that has the format. Both stand beside the 16-bit checkpoint in eager fp32,
with the same seeds. Results are written to bench/results/file-formats.json, with a table and a contact sheet beside it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overcrank.models.demo import clips
from overcrank.models.demo.evaluate import prompts
from overcrank.runtime.pipeline.load import load
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "file-formats.json"
MODEL, STEPS, PROMPTS, COLUMNS = "ltx-demo", 12, 4, 4
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


def rendered(backend: str, store: Path, file: Path | None = None) -> Rendered:
    weights = [f"transformer={file}"] if file else ()
    pipe = load(MODEL, backend=backend, device="cpu", store=store, weights=weights)
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


def row(form: str, store: Path, expected: Rendered, rows: dict[str, np.ndarray]) -> dict[str, Any]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="overcrank-bench-") as folder:
        file = file_of(form, Path(folder))
        size = file.stat().st_size
        eager, engine = (rendered(backend, store, file) for backend in ("eager", "onnxruntime"))
    rows[f"{form}, eager"], rows[form] = eager[1], engine[1]
    found = {"weights": compared(eager, expected), "multiplied": compared(engine, expected)}
    return {"format": form, "file_mb": round(size / 1e6, 2), **found, "seconds": round(time.monotonic() - start)}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["# ltx-demo from files of each format", "", *(__doc__ or "").strip().splitlines()[2:], ""]
    lines += ["| | file | weights alone: cosine, worst step | PSNR | as a card multiplies it: cosine | PSNR |"]
    lines += ["|---|---|---|---|---|---|"]
    for r in rows:
        cells = [f"{r[k]['worst_step']} | {r[k]['psnr_db']} dB" for k in ("weights", "multiplied")]
        lines.append(f"| {r['format']} | {r['file_mb']} MB | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    sys.path.insert(0, str(ROOT))
    known = json.loads(RESULTS.read_text("utf-8"))["rows"] if RESULTS.is_file() else []
    done = {r["format"]: r for r in known}
    sheets: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory(prefix="overcrank-bench-") as folder:
        store = Path(folder)
        expected = rendered("eager", store)
        sheets["16 bit"] = expected[1]
        for form in sys.argv[1:] or FORMATS:
            done[form] = row(form, store, expected, sheets)
            print(json.dumps(done[form]), flush=True)
            ordered = [done[f] for f in FORMATS if f in done]
            about = {"command": "python bench/file_formats.py", "date": datetime.now(UTC).date().isoformat()}
            RESULTS.write_text(json.dumps({**about, "rows": ordered}, indent=1) + "\n", "utf-8")
            RESULTS.with_suffix(".md").write_text(table(ordered), "utf-8")
            sheet(sheets).save(RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
