"""What keeps the project small and its imports honest."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
from overcrank import cli

pytestmark = pytest.mark.quick

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


def test_data_is_in_the_wheel() -> None:
    """A file that is not listed is there in development and absent from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for layer in LAYERS:
        for file in (ROOT / layer).rglob("*.json"):
            patterns = {
                owner: patterns
                for package, patterns in listed.items()
                if file.is_relative_to(owner := ROOT.joinpath(*package.split(".")[1:]))
            }
            assert any(
                file.relative_to(o).match(p) or p == f"{file.relative_to(o).parts[0]}/**"
                for o, ps in patterns.items()
                for p in ps
            ), file


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


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_functions_take_few_parameters(file: Path) -> None:
    """What belongs together is one thing with a name; a network's forward takes what its checkpoint's does."""
    if file.relative_to(ROOT).parts[0] == "models":
        return
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            assert len([name for name in names if name not in ("self", "cls")]) <= 6, node.name


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("build-engine", "overcrank")


def shown_commands(page: Path) -> list[list[str]]:
    """Words of each of our commands in a page's blocks of anything but Python, behind a prompt or not."""
    language, commands = "", []
    for line in page.read_text("utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            language = "" if language else line.removeprefix("```").strip() or "text"
        elif language and language != "python" and line.removeprefix("$ ").startswith(tuple(f"{p} " for p in PROGRAMS)):
            commands.append(shlex.split(line.removeprefix("$ "), comments=True))
    return commands


def check_command(name: str, *words: str) -> None:
    """As click reads it: the command is there, and takes these options with these values; raises UsageError."""
    command: click.Command = cli.build_engine if name == "build-engine" else cli.main
    left = list(words)
    while isinstance(command, click.Group) and left and not left[0].startswith("-"):
        if left[0] not in command.commands:
            raise click.UsageError(f"no command {left[0]}")
        command = command.commands[left.pop(0)]
    # A context without the command's settings would leave it with click's own --help for the rest of the process.
    context = click.Context(command, **command.context_settings)
    values, more, _ = command.make_parser(context).parse_args(left)
    if more or (isinstance(command, click.Group) and not (values or command.invoke_without_command)):
        raise click.UsageError(f"{more or 'nothing'} follows {command.name}")
    for parameter in command.params:
        given = values.get(parameter.name)
        if isinstance(given, str) and not isinstance(parameter.type, click.Path):
            parameter.type_cast_value(context, given)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_show_commands_that_parse(page: Path) -> None:
    for words in shown_commands(page):
        check_command(*words)


def test_the_pages_that_show_commands() -> None:
    """Fewer would mean that they are not seen any more."""
    shown = {str(page.relative_to(ROOT)): len(shown_commands(page)) for page in PAGES}
    assert all(shown[name] for name in ("README.md", "docs/building.md", "docs/rendering.md", "docs/engines.md"))
    assert sum(shown.values()) >= 30


@pytest.mark.parametrize(
    "words",
    [
        "overcrank rendr --prompt x",
        "overcrank render --prompt x --stepz 3",
        "overcrank render --prompt x --steps many",
        "overcrank engines",
        "overcrank engines list more",
        "build-engine --model",
    ],
)
def test_a_wrong_command_on_a_page_would_be_seen(words: str) -> None:
    with pytest.raises(click.UsageError):
        check_command(*words.split())


OF_OTHERS = {
    *("_replace", "_fields", "_asdict"),  # of named tuples
    "_exit",  # of os
    *("_parameters", "_modules"),  # of torch's modules
    *("_hf_hook", "_reset_stateful_cache", "_interrupt", "_current_timestep", "_get_mllm_prompt_embeds"),  # diffusers
    "_get_single_file_loadable_mapping_class",  # of diffusers too
}


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_tests_look_at_nothing_private(file: Path) -> None:
    """Of the product's objects; an object's own are its own."""
    private = {
        f"{ast.unparse(node)} in line {node.lineno}"
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in OF_OTHERS
        and ast.unparse(node.value) not in ("self", "cls")
    }
    assert not private


def test_no_machine_path_or_index_host_is_named() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = re.compile(r"/wo[r]k/|pypi\.o[r]g|/opt/wh[e]els|files\.python[h]osted|download\.pytorch\.o[r]g")
    for name in tracked.split():
        file = ROOT / name
        if file.suffix in (".py", ".md", ".toml", ".txt", ".sh", ".json", ".Dockerfile", ".yml") and file.is_file():
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
