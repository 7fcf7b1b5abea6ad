"""The command line as people type it; nothing is built or rendered."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from overcrank import cli
from overcrank.cli.options import SECTIONS

pytestmark = pytest.mark.quick


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


ALL = dict(commands(cli.main))


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_and_option_says_what_it_is_for(words: tuple[str, ...], run: Any) -> None:
    short, long = (run("overcrank", *words, flag) for flag in ("-h", "--help"))
    assert short.exit_code == 0
    assert short.output == long.output
    assert ALL[words].help
    options = [p for p in ALL[words].params if isinstance(p, click.Option)]
    assert not [o.name for o in options if not o.help]
    assert all(any(name in line for line in short.output.splitlines()) for o in options for name in o.opts)


@pytest.mark.parametrize("words", [("render",), ("batch",), ("build",), ("engines", "build")], ids=" ".join)
def test_long_helps_have_headings(words: tuple[str, ...], run: Any) -> None:
    lines = run("overcrank", *words, "-h").output.splitlines()
    shown = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert [s for s in SECTIONS if s in shown] == [s for s in shown if s in SECTIONS]
    assert len(shown) >= 3
    other = lines[lines.index("Other:") + 1 :]
    assert other[0].split() == ["-h,", "--help", "Show", "this", "message", "and", "exit."]
    sections = [name for names in SECTIONS.values() for name in names.split()]
    assert len(sections) == len(set(sections))
    assert set(sections) <= {p.name for command in ALL.values() for p in command.params} | {"models", "precisions"}


@pytest.mark.parametrize("words", [("render",), ("batch",), ("build",)], ids=" ".join)
def test_examples_parse(words: tuple[str, ...]) -> None:
    import shlex

    epilog = ALL[words].epilog or ""
    examples = [shlex.split(line) for line in epilog.splitlines() if "overcrank " in line or "build-engine " in line]
    assert len(examples) >= 2
    for program, *arguments in examples:
        own = arguments if program == "build-engine" else arguments[1:]
        context = ALL[words].make_context(program, own)
        assert context.params


def test_a_prompt_is_an_argument_or_an_option_and_not_both(run: Any) -> None:
    result = run("overcrank", "render", "a red circle", "--prompt", "a blue square")
    assert result.exit_code == 2
    assert "given twice" in result.output
    for words in (["a red circle"], ["--prompt", "a red circle"]):
        refused = run("overcrank", "render", *words, "--steps", "0")
        assert refused.exit_code == 2
        assert "--steps" in refused.output


@pytest.mark.heavy
def test_it_is_a_module_too() -> None:
    done = subprocess.run([sys.executable, "-m", "overcrank", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("overcrank ")


def test_build_is_build_engine(run: Any) -> None:
    """With the card as nvidia-smi names it, which the refusal of its precision shows to be understood."""
    card = "NVIDIA GeForce RTX 3060 Laptop GPU"
    for words in (("build-engine",), ("overcrank", "build"), ("overcrank", "build-engine")):
        refused = run(*words, "--model", "ltx", "--gpu", card, "--precision", "fp8")
        assert refused.exit_code == 2
        assert "sm_86 (Ampere) has no fp8" in refused.output


REPORTING = [words for words, c in ALL.items() if any(p.name == "as_json" for p in c.params)]


def test_every_command_that_reports_has_json_and_its_page_lists_it() -> None:
    """Those without print a key for others to take, or one line of what they did."""
    page = (Path(cli.__file__).parents[1] / "docs/json.md").read_text("utf-8")
    told = {name for row in re.findall(r"^\| (`.*?) \|", page, re.M) for name in re.findall(r"`([^`]+)`", row)}
    assert told - {"build-engine", "command"} == {" ".join(words) for words in REPORTING} - {"build-engine"}
    silent = {"calibrate", "pack", "engines rm", "engines sign", "keys new", "keys trust", "keys revoke"}
    groups = {" ".join(words) for words, c in ALL.items() if isinstance(c, click.Group)} - {"models"}
    assert {" ".join(words) for words in ALL} - {" ".join(w) for w in REPORTING} == silent | groups


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("models",), {"models", "targets"}),
        (("models", "show", "ltx-demo"), {"name", "networks", "profile", "download", "tasks"}),
        (("keys", "list"), {"keys"}),
        (("doctor", "--quick"), {"findings"}),
        (("engines", "list"), {"bundles"}),
        (("engines", "fsck"), {"problems", "removed"}),
        (("engines", "gc", "--dry-run"), {"items", "removed"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_json_documents(words: tuple[str, ...], names: set[str], run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("OVERCRANK_HOME", str(tmp_path))
    result = run("overcrank", *words, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    named = [word for word in words if word in ("show", "list", "fsck", "gc") or word == words[0]]
    assert (document["format"], document["command"]) == (1, " ".join(named))
    assert names <= set(document)


def test_what_asks_cannot_be_told_to_be_json_alone(run: Any, tmp_path: Path) -> None:
    refused = run("overcrank", "engines", "gc", "--json", "--store", tmp_path)
    assert refused.exit_code == 2
    assert "--yes" in refused.output


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("overcrank render --model wan-2.2-t", {"wan-2.2-ti2v-5b", "wan-2.2-t2v-a14b"}),
        ("build-engine --gpu rtx509", {"rtx5090", "rtx5090d"}),
        ("overcrank engines show ltx-d", {"ltx-demo-x"}),
        ("overcrank ver", {"verify"}),
    ],
)
@pytest.mark.heavy
def test_completion(typed: str, offered: set[str], tmp_path: Path) -> None:
    (tmp_path / "bundles" / "ltx-demo-x").mkdir(parents=True)
    (tmp_path / "bundles" / "ltx-demo-x" / "manifest.json").write_text("{}")
    script = typed.split()[0]
    variable = f"_{script.upper().replace('-', '_')}_COMPLETE"
    own = os.environ | {variable: "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    code = f"from overcrank.cli import main, build_engine; {'main' if script == 'overcrank' else 'build_engine'}"
    code += f"(prog_name={script!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=own | {"OVERCRANK_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == offered, done.stderr
