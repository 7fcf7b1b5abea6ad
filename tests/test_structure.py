"""What keeps the project small and its imports honest."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["models", "export", "engines", "runtime", "calibration", "api", "cli"]
BELOW = ["errors", "owners", "files", "units", "options"]
SOURCES = sorted(p for layer in LAYERS for p in (ROOT / layer).rglob("*.py"))
SOURCES += [ROOT / f"{name}.py" for name in ("api", *BELOW)]


def imports(file: Path) -> set[str]:
    """overcrank layers that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {n.split(".")[1] for n in names if n.startswith("overcrank.")}
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if own in BELOW:
        assert imports(file) <= {"errors", "owners"} - {own}
        return
    assert imports(file) <= {*LAYERS[: LAYERS.index(own) + 1], *BELOW}


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_only_the_command_line_prints(file: Path) -> None:
    if file.relative_to(ROOT).parts[0] == "cli" or "demo" in file.parts:  # which trains the demo, a program of its own
        return
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {n.split(".")[0] for n in names} & {"rich", "click"}
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")


def test_packages_are_the_tree() -> None:
    """A package that is not listed imports in development and is absent from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tree = {"overcrank"} | {
        "overcrank." + str(p.parent.relative_to(ROOT)).replace("/", ".")
        for layer in LAYERS
        for p in (ROOT / layer).rglob("__init__.py")
    }
    assert set(listed) == tree


def test_no_family_is_named_outside_models() -> None:
    from overcrank.models import families

    word = re.compile(rf"""["']({"|".join(families())})(-[^"']*)?["']""")
    files = [f for f in SOURCES if f.relative_to(ROOT).parts[0] != "models"]
    named = [f"{f.name}:{i}" for f in files for i, s in enumerate(f.read_text().splitlines(), 1) if word.search(s)]
    assert not named


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_and_functions_stay_small(file: Path) -> None:
    text = file.read_text("utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


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


PAGES = ["README.md", *(f"docs/{name}.md" for name in ("building", "rendering", "engines", "quantization"))]


@pytest.mark.parametrize("page", PAGES)
def test_pages_show_commands_that_parse(page: str) -> None:
    """As click reads them: each command is there, and takes these options with these values."""
    import shlex

    import click
    from overcrank import cli

    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    commands = [words for words in lines if words and words[0] in ("build-engine", "overcrank")]
    assert commands
    for name, *words in commands:
        command: click.Command = cli.build_engine if name == "build-engine" else cli.main
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            assert words[0] in command.commands, (page, words)
            command = command.commands[words.pop(0)]
        context = click.Context(command)
        values, left, _ = command.make_parser(context).parse_args(words)
        assert not left, (page, words)
        for parameter in command.params:
            given = values.get(parameter.name)
            if isinstance(given, str) and not isinstance(parameter.type, click.Path):
                parameter.type_cast_value(context, given)


def test_no_machine_path_or_index_host_is_named() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = re.compile(r"/wo[r]k/|pypi\.o[r]g|/opt/wh[e]els|files\.python[h]osted")
    for name in tracked.split():
        file = ROOT / name
        if file.suffix in (".py", ".md", ".toml", ".txt", ".sh", ".json") and file.is_file():
            assert not words.search(file.read_text("utf-8")), name


def test_the_table_of_the_architecture_names_what_there_is() -> None:
    """Each row's file has the name; there are at least twenty."""
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| [^|]+ \| `([^`]+)`[^|]* \| `([^`]+)` \|$", text, re.M)
    assert len(rows) >= 20
    for file, name in rows:
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text("utf-8")), (file, name)
    for file in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / file).is_file(), file
