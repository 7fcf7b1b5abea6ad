"""The documentation: the site builds without a warning, and what its pages say of the code is so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import overcrank
import pytest
import yaml
from overcrank import cli
from overcrank.engines.manifest import ComponentEntry, EngineKey, Manifest
from overcrank.export.quantization.recipe import Calibration, ComponentRecipe, Recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    file.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/adr/*.md")
    for file in ROOT.glob(pattern)
)
GENERATED = ("docs/models.md", "docs/recipes.md", "docs/published.md", "docs/diffusers.md")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.S)
TERM = re.compile(r"^\| ([^|]+?) \| [^|]+ \|([^|]*)\|$", re.M)


def text_of(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strictly: a page that is not in the navigation, a link or an anchor that leads nowhere are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES) - 3
    for page in pages:
        text = page.read_text("utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(https?:|//)", text)
        loaded += re.findall(r"<link\b[^>]*\bhref=[\"']?(?:https?:|//)", text)
        assert not loaded, page.name


def test_the_command_line_and_the_api_are_on_the_site(site: Path) -> None:
    commands = (site / "commands.html").read_text("utf-8")
    for option in (p for _, c in every_command() for p in c.params if isinstance(p, click.Option)):
        assert option.opts[-1] in commands, option.opts
    api = (site / "api.html").read_text("utf-8")
    for name in overcrank.LoadOptions.__dataclass_fields__:
        assert re.search(rf'id="overcrank\.\w+\.{name}"', api), name


def test_the_api_page_lists_what_is_exported() -> None:
    listed = re.findall(r"^::: overcrank\.(\w+)$", text_of("docs/api.md"), re.M)
    assert sorted(listed) == sorted(set(overcrank.__all__) - {"__version__"})


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_in_the_repository(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", CODE.sub("", text_of(page)))
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED])
def test_files_that_pages_name_exist(page: str) -> None:
    folders = "models|export|engines|runtime|calibration|cli|tests|bench|docs|docker|examples"
    named = re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", text_of(page))
    assert not [file for file in named if not (ROOT / file).exists()]


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").split()) <= 700


def test_decisions_are_all_in_their_index() -> None:
    index = text_of("docs/adr/README.md")
    for file in (ROOT / "docs/adr").glob("0*.md"):
        title = file.read_text("utf-8").splitlines()[0].partition(". ")[2]
        assert f"]({file.name}) | {title} |" in index, file.name


def fields_on_schema_page(heading: str) -> set[str]:
    """Of the first column of the table after a heading or a sentence."""
    rows = text_of("docs/schemas.md").partition(heading)[2].partition("|---|---|\n")[2].partition("\n\n")[0]
    return {name for row in rows.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_the_schemas_are_those_of_the_code() -> None:
    assert fields_on_schema_page("## Manifest") == set(Manifest.model_fields)
    assert fields_on_schema_page("An entry of `components`:") == set(ComponentEntry.model_fields)
    assert fields_on_schema_page("## Recipe") == set(Recipe.model_fields)
    page = text_of("docs/schemas.md")
    for name in (*Calibration.model_fields, *ComponentRecipe.model_fields):
        assert f"`{name}`" in page, name
    keys = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text_of("docs/how-it-works.md"), re.M)
    assert {name for row in keys for name in re.findall(r"\w+", row)} == set(EngineKey._fields)


def test_the_table_of_formats_is_that_of_the_code() -> None:
    from overcrank.cli.files import formats_table

    assert formats_table() in text_of("docs/files.md")


def every_command(
    command: click.Command = cli.main, path: tuple[str, ...] = ("overcrank",)
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from every_command(child, (*path, name))


def forbidden_words() -> list[re.Pattern[str]]:
    """Whole words; an abbreviation, or a term that is the same but for its case, as it is written."""
    cells = [
        (term, word.strip()) for term, words in TERM.findall(text_of("docs/glossary.md")) for word in words.split(",")
    ]
    pairs = [(term, word) for term, word in cells if word not in ("", "not")]
    exact = {word for term, word in pairs if word.isupper() or word.lower() == term.lower()}
    return [re.compile(rf"(?<![\w-]){re.escape(w)}(?![\w-])", 0 if w in exact else re.I) for _, w in pairs]


def test_the_glossary_is_small_and_kept_to() -> None:
    terms = [term for term, _ in TERM.findall(text_of("docs/glossary.md"))][1:]
    assert terms == sorted(terms, key=str.lower)
    assert 20 <= len(terms) <= 30
    texts = {page: CODE.sub("", text_of(page)) for page in PAGES if page not in (*GENERATED, "docs/glossary.md")}
    texts |= {
        " ".join(path): command.get_help(click.Context(command, **command.context_settings))
        for path, command in every_command()
    }
    words = forbidden_words()
    assert len(words) > 20
    said = [(where, found.group()) for where, text in texts.items() for w in words if (found := w.search(text))]
    assert not said


@pytest.mark.parametrize("file", sorted((ROOT / "docker").glob("*.Dockerfile")), ids=lambda f: f.name)
def test_dockerfiles_are_clean(file: Path) -> None:
    """As hadolint reads them; nobody could build them where the tests run."""
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = file.read_text("utf-8")
    pinned = re.search(r'"torch==([\d.]+)\+', text)
    assert pinned
    assert f"torch=={pinned[1]}" in (ROOT / "constraints.txt").read_text().splitlines()
    extras = re.search(r'"\.\[([\w,]+)\]"', text)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras
    assert set(extras[1].split(",")) <= set(known)


def test_the_workflow_runs_what_a_change_must_pass() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads "on" as true
    steps = workflow["jobs"]["check"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert all("@" in step["uses"] for step in steps if "uses" in step)
    assert "./build.sh docs" in (ROOT / ".ci/run").read_text()


def test_the_notebook_is_stored_as_it_ran() -> None:
    notebook = json.loads((ROOT / "examples/overcrank.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
