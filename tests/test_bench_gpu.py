"""The dry run of `./build.sh bench-gpu`, and its report on made-up figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "bench_gpu.py"), "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_dry_run_walks_through_the_parts_and_resumes(tmp_path: Path, seeded: Callable[[Path], Path]) -> None:
    ways = ["--way", "eager", "--way", "onnxruntime-fp8"]
    options = [*ways, "--seconds", 0.1, "--out", tmp_path / "out", "--store", seeded(tmp_path / "store")]
    done = bench(*options)
    assert done.returncode == 0, done.stderr
    parts = {f.stem: json.loads(f.read_text()) for f in (tmp_path / "out").glob("parts/*/*.json")}
    assert set(parts) == {"eager", "onnxruntime-fp8"}
    assert parts["eager"]["denoiser"]["tflop"] > 0
    assert parts["eager"]["denoiser"]["relative_error"] == 0
    assert parts["eager"]["render"]["fast"]["skipped"] > parts["eager"]["render"]["off"]["skipped"] == 0
    assert 0 < parts["onnxruntime-fp8"]["denoiser"]["relative_error"] < 0.1
    assert parts["onnxruntime-fp8"]["render"]["off"]["psnr_db"] > 30
    report = (tmp_path / "out" / "README.md").read_text()
    assert "**A dry run on a processor" in report
    assert "| onnxruntime-fp8 | denoiser |" in report
    assert (tmp_path / "out" / "ltx-demo-64x64x17.png").stat().st_size > 1000
    (tmp_path / "out" / "parts" / "ltx-demo-64x64x17" / "onnxruntime-fp8.json").unlink()
    again = bench(*ways[:2], *options[4:])
    assert again.stdout.splitlines()[0].endswith("eager: there already")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--way", "engine-bf16"], "--way: there are eager, compile, onnxruntime"),
        (["--model", "mochi"], "--model mochi: use one of ltx-demo, ltx-2b-0.9.5"),
    ],
)
def test_wrong_words(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_gpu

    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--device", "cpu", *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        bench_gpu.main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
def test_the_report_names_engines_that_lose_and_parts_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_report

    def row(ms: float, **more: Any) -> dict[str, Any]:
        return {"ms": ms, "p10_ms": ms, "p90_ms": ms, "relative_error": 0.01, "cosine": 0.9999, **more}

    parts = {
        "net/eager": {"denoiser": row(100.0, tflop=10.0)},
        "net/compile": {"denoiser": row(60.0)},
        "net/engine-bf16": {"denoiser": row(80.0, build_s=20.0)},
        "net/engine-fp8": {"denoiser": row(120.0)},
        "net/engine-int8": {"denoiser": {"error": "not done within 480 seconds"}},
    }
    about = {"card": "A card", "date": "2026-11-21", "device": "cuda", "dtype": "bf16"}
    gpu_report.write(tmp_path, about | {"peak": {"bf16": 200.0, "fp8": 400.0}}, parts)
    lines = {line.split(" | ")[0]: line for line in (tmp_path / "README.md").read_text().splitlines()}
    assert "| 1.00 | 1.67 | 100.00 | 50% |" in lines["| eager"]
    assert "| 0.80 | 1.33 | 125.00 | 62% |" in lines["| engine-bf16"]
    assert "**slower than torch.compile**" in lines["| engine-bf16"]
    assert "| 83.33 | 21% |" in lines["| engine-fp8"]
    assert "**slower than eager**" in lines["| engine-fp8"]
    assert "not done within 480 seconds" in lines["| engine-int8"]
    assert "dry run" not in (tmp_path / "README.md").read_text()
