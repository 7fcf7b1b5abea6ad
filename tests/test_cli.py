"""The command line as people type it; nothing is built or rendered."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import click
import pytest
from overcrank import cli
from overcrank.cli.options import SECTIONS


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
