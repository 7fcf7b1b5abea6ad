"""The report of `bench-gpu`: a Markdown table and plots of what its parts have left in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Parts = dict[str, dict[str, Any]]
"""case/way → what its part found."""


def write(folder: Path, about: dict[str, Any], parts: Parts) -> None:
    cases = list(dict.fromkeys(name.partition("/")[0] for name in parts))
    lines = [f"# {about['card']}, {about['date']}", ""]
    if about["device"] == "cpu":
        lines += ["**A dry run on a processor, in fp32: it shows that every part runs, and nothing of a card.**", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key not in ("card", "date")]
    for case in cases:
        ways = {name.partition("/")[2]: found for name, found in parts.items() if name.startswith(f"{case}/")}
        lines += ["", f"## {case}", "", *_components(ways, about), *_renders(ways)]
        _plot(folder / f"{case}.png", case, ways)
        lines += ["", f"![{case}]({case}.png)"]
    (folder / "README.md").write_text("\n".join([*lines, ""]), "utf-8")


def _components(ways: Parts, about: dict[str, Any]) -> list[str]:
    lines = ["| way | part | ms (10th, 90th) | of eager | of compile | TFLOP/s | of the peak | error | cosine |"]
    lines[0] += " first call s | load s | build s | engine MB | card GB | |"
    lines += ["|---" * 15 + "|"]
    for name in ("denoiser", "vae_decoder"):
        eager, compiled = (ways.get(way, {}).get(name, {}).get("ms") for way in ("eager", "compile"))
        tflop = ways.get("eager", {}).get(name, {}).get("tflop")
        for way, found in ways.items():
            if name not in found:
                continue
            row = found[name]
            if "error" in row:
                lines.append(f"| {way} | {name} | {row['error'].replace('|', '/')} |" + " |" * 12)
                continue
            rate = tflop / row["ms"] * 1000 if tflop else None
            peak = about["peak"].get("fp8" if "fp8" in way else about["dtype"])
            cells = [f"{row['ms']:.2f} ({row['p10_ms']:.2f}, {row['p90_ms']:.2f})"]
            cells += [_ratio(row["ms"], eager), _ratio(row["ms"], compiled)]
            cells += [_number(rate), "" if not (rate and peak) else f"{rate / peak:.0%}"]
            cells += [f"{row['relative_error']:.1e}", f"{row['cosine']:.6f}"]
            cells += [_number(row.get(k)) for k in ("first_call_s", "load_s", "build_s", "engine_mb", "card_used_gb")]
            slower = "**slower than eager**" if eager and way != "eager" and row["ms"] > eager else ""
            if not slower and compiled and way.startswith("engine") and row["ms"] > compiled:
                slower = "**slower than torch.compile**"
            lines.append(f"| {way} | {name} | {' | '.join(cells)} | {slower} |")
    return lines


def _renders(ways: Parts) -> list[str]:
    lines = ["", "| way | step cache | seconds | of eager | steps skipped | step ms | lowest cosine | PSNR dB |"]
    lines += ["|---" * 8 + "|"]
    base = ways.get("eager", {}).get("render", {}).get("off", {}).get("seconds")
    for way, found in ways.items():
        render = found.get("render", {})
        if "error" in render:
            lines.append(f"| {way} | | {render['error'].replace('|', '/')} |" + " |" * 5)
            continue
        for level, row in render.items():
            cells = [f"{row['seconds']:.2f}", _ratio(row["seconds"], base), f"{row['skipped']} of {row['steps']}"]
            cells += [_number(row.get("step_p50_ms")), f"{row['lowest_cosine']:.6f}", _number(row["psnr_db"])]
            lines.append(f"| {way} | {level} ({row['threshold']}) | {' | '.join(cells)} |")
    return lines if len(lines) > 3 else []


def _ratio(value: float, base: float | None) -> str:
    return f"{value / base:.2f}" if base else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _plot(file: Path, case: str, ways: Parts) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = {way: found["denoiser"] for way, found in ways.items() if "ms" in found.get("denoiser", {})}
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(known) + 1.5))
    spread = [[max(0, r["ms"] - r["p10_ms"]) for r in known.values()], [r["p90_ms"] - r["ms"] for r in known.values()]]
    axes.barh(list(known), [r["ms"] for r in known.values()], xerr=spread, color="tab:blue", ecolor="black")
    axes.invert_yaxis()
    axes.set_xlabel("denoiser, ms a call (10th to 90th percentile)")
    axes.set_title(case)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def read_parts(folder: Path) -> Parts:
    """In the order in which they were measured."""
    return {
        f"{file.parent.name}/{file.stem}": json.loads(file.read_text("utf-8"))
        for file in sorted((folder / "parts").glob("*/*.json"), key=lambda f: f.stat().st_mtime_ns)
    }
