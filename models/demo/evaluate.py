"""Does the demo checkpoint render what its prompts say? `python -m overcrank.models.demo.evaluate`

Prompts of (colour, shape, motion) combinations that training never showed, on every
background, with fixed seeds, through plain diffusers in fp32, judged by `judge.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overcrank.models import resolve
from overcrank.models.demo import FOLDER, captions, clips
from overcrank.models.demo.judge import Verdict, judge

REQUIRED = {"colour": 0.95, "shape": 0.90, "motion": 0.95}
DIRECTIONS = tuple(f"moving {d}" for d in captions.DIRECTIONS)


@dataclass(frozen=True)
class Trial:
    prompt: str
    truth: Verdict
    verdict: Verdict
    frames: np.ndarray  # [F, H, W, 3] in [0, 1]


def prompts() -> list[tuple[str, Verdict]]:
    """Every held-out combination on every background: 72 prompts and what should be seen."""
    _, held_out = clips.split()
    return [
        (f"a{'n' * (c == 'orange')} {c} {s} {m} on a {background} background", Verdict(c, s, m))
        for c, s, m in held_out
        for background in captions.BACKGROUNDS
    ]


def trials(pipe: Any, chosen: list[tuple[str, Verdict]], batch: int = 8) -> list[Trial]:
    """Render and judge; the seed of a prompt is its place in `chosen`."""
    variant = resolve(FOLDER.name)
    done = []
    for start in range(0, len(chosen), batch):
        part = chosen[start : start + batch]
        videos = pipe(
            [prompt for prompt, _ in part],
            height=clips.SIZE,
            width=clips.SIZE,
            num_frames=clips.FRAMES,
            frame_rate=clips.FPS,
            num_inference_steps=variant.rendering().steps,
            guidance_scale=variant.rendering().guidance,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
            output_type="np",
        ).frames
        done += [Trial(p, w, judge(v), v) for (p, w), v in zip(part, videos, strict=True)]
    return done


def scores(done: list[Trial]) -> dict[str, float]:
    """Share of trials right in each aspect; "motion" counts all motions, "direction" the four ways to move."""

    def share(aspect: str, counted: list[Trial]) -> float:
        right = [t for t in counted if getattr(t.verdict, aspect) == getattr(t.truth, aspect)]
        return len(right) / max(1, len(counted))

    moving = [t for t in done if t.truth.motion in DIRECTIONS]
    return {aspect: share(aspect, done) for aspect in REQUIRED} | {"direction": share("motion", moving)}


def table(done: list[Trial]) -> str:
    """Markdown: the scores, then every word with how often it was right, then what went wrong."""
    shares = scores(done)
    lines = ["| aspect | right | required |", "|---|---|---|"]
    lines += [f"| {a} | {shares[a]:.1%} | {REQUIRED[a]:.0%} |" for a in REQUIRED]
    lines += [f"| direction (of the four ways to move) | {shares['direction']:.1%} | {REQUIRED['motion']:.0%} |"]
    lines += ["", "| word | right | of |", "|---|---|---|"]
    for aspect in REQUIRED:
        counts = Counter(getattr(t.truth, aspect) for t in done)
        right = Counter(
            getattr(t.truth, aspect) for t in done if getattr(t.verdict, aspect) == getattr(t.truth, aspect)
        )
        lines += [f"| {word} | {right[word]} | {count} |" for word, count in sorted(counts.items())]
    wrong = [t for t in done if t.verdict != t.truth]
    lines += ["", f"{len(done)} prompts; not as asked: {len(wrong)}"]
    lines += [f"- {t.prompt}: seen as {t.verdict.colour} {t.verdict.shape} {t.verdict.motion}" for t in wrong]
    return "\n".join(lines) + "\n"


def samples(done: list[Trial], picture: Path) -> None:
    """First, middle and last frame of every third trial."""
    from PIL import Image

    rows, chosen = [], done[::3]
    for start in range(0, len(chosen) - len(chosen) % 4, 4):
        tiles = [t.frames[f] for t in chosen[start : start + 4] for f in (0, clips.FRAMES // 2, -1)]
        rows.append(np.concatenate([np.pad(t, ((2, 2), (2, 2), (0, 0)), constant_values=0.3) for t in tiles], 1))
    pixels = (np.concatenate(rows, 0) * 255).round().astype(np.uint8)
    Image.fromarray(pixels).resize((pixels.shape[1] * 2, pixels.shape[0] * 2)).save(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER, help="checkpoint [default: the package's]")
    parser.add_argument("--report", type=Path, help="folder for evaluation.md and samples.png")
    arguments = parser.parse_args()
    from diffusers import LTXPipeline

    pipe = LTXPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    done = trials(pipe, prompts())
    text = table(done)
    print(text)
    if arguments.report:
        command = "Made by `python -m overcrank.models.demo.evaluate --report models/demo`.\n\n"
        (arguments.report / "evaluation.md").write_text("# ltx-demo on held-out prompts\n\n" + command + text, "utf-8")
        samples(done, arguments.report / "samples.png")
    shares = scores(done)
    sys.exit(0 if all(shares[a] >= REQUIRED[a] for a in REQUIRED) else 1)


if __name__ == "__main__":
    main()
