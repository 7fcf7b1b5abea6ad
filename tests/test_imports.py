"""What importing overcrank brings along: nothing heavy before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

PURE = [
    "models",
    "models.ltx",
    "engines.targets",
    "engines.profiles",
    "engines.manifest",
    "engines.store",
    "engines.plan",
    "engines.build",
    "cli.build_report",
    "export.quantization.recipe",
    "cli",
]


def test_pure_modules_import_no_torch_and_no_tensorrt() -> None:
    code = "import sys; " + "; ".join(f"import overcrank.{m}" for m in PURE)
    code += "; print([m for m in ('torch', 'tensorrt_rtx', 'tensorrt', 'onnx', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("script", ["build_engine", "main"])
def test_help_imports_neither_models_nor_pydantic(script: str) -> None:
    code = (
        f"import sys; from overcrank.cli import {script}\n"
        f"try: {script}(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'pydantic', 'rich', 'overcrank.models') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage:" in done.stdout
    assert done.stdout.strip().endswith("[]")
