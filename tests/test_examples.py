"""The examples run as they are, and say what they are to say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SLOW = pytest.mark.sweep
EXAMPLES = {
    "01_render": r"ltx-demo, backend auto.*denoiser: \w+ 24 calls",
    "02_accelerate": r"denoiser: onnxruntime \d+ calls.*pixel: 0\.0000.*same bits as before: True",
    "03_batch": r"green-cross done.*\['skipped', 'skipped', 'skipped'\]",
    "04_build_for_a_card": r"ltx-demo-sm_89-bf16.*GEMMs.*within 1e-4: True",
    "05_calibrate_and_compare": r"PSNR of fp8 against eager fp32: [345]\d\.\d dB",
    "06_publish_and_pull": r"published ltx-demo.*before the key is trusted: .*pulled ltx-demo",
}
QUICK = ("01_render", "03_batch")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OVERCRANK_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_are_here_and_short() -> None:
    files = sorted((ROOT / "examples").glob("*.py"))
    assert [file.stem for file in files] == list(EXAMPLES)
    assert all(file.read_text("utf-8").count("\n") < 40 for file in files)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else SLOW) for n in EXAMPLES])
def test_an_example_runs(name: str, home: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert re.search(EXAMPLES[name], done.stdout, re.S), done.stdout


@SLOW
def test_the_examples_of_the_api_page_run(home: Path) -> None:
    """One after the other, with a key for what is signed; ONNX Runtime and TensorRT's compiler as installed."""
    from overcrank.engines.trust import Keyring

    Keyring().new("studio")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text("utf-8"), re.S)
    assert len(blocks) >= 5
    script = home / "page.py"  # a file, for building starts processes
    body = "".join(f"    {line}\n" if line else "\n" for block in blocks for line in block.splitlines())
    script.write_text(f'if __name__ == "__main__":\n{body}    print(folder.name)\n', "utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ltx-demo-sm_89-bf16" in done.stdout
    assert (home / "recipe.json").is_file()


@SLOW
def test_the_notebook_runs_again(home: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples/overcrank.ipynb", as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(home)}}).execute()
    assert any("image/png" in o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
