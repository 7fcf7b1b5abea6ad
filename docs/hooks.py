"""What the site needs beside the pages of docs/: pages from elsewhere, links that lead to them, the commands' help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files
from overcrank.cli import main

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "bench/results/*.md", "examples/*.py", "examples/*.ipynb")
SOURCES = ROOT / ".cache" / "docs" / "overcrank"
COMMANDS = "<!-- the help of every command -->"


def on_startup(**_: Any) -> None:
    """The package alone, as links: what reads docstrings would follow those of the tree in circles."""
    SOURCES.mkdir(parents=True, exist_ok=True)
    for link in SOURCES.iterdir():
        link.unlink()
    for entry in ROOT.iterdir():
        if entry.suffix == ".py" or ((entry / "__init__.py").is_file() and entry.name != "tests"):
            (SOURCES / entry.name).symlink_to(entry)


def _outside() -> list[str]:
    return [file.relative_to(ROOT).as_posix() for pattern in OUTSIDE for file in sorted(ROOT.glob(pattern))]


def on_files(files: Files, config: Any) -> Files:
    for name in _outside():
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def _contexts(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[click.Context]:
    context = click.Context(command, parent, name, terminal_width=76, **command.context_settings)
    yield context
    if isinstance(command, click.Group):
        names = {id(child): name for name, child in command.commands.items()}  # one that has two names once
        for child in sorted(names.values()):
            yield from _contexts(command.commands[child], child, context)


def _commands() -> str:
    contexts = _contexts(main, "overcrank")
    return "\n".join(f"## {c.command_path}\n\n```text\n{c.get_help()}\n```\n" for c in contexts)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """In the repository docs/ is one folder deeper than on the site, where it is the root."""
    source = page.file.src_uri
    if source in _outside():
        return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
    up = "../" * source.count("/")
    return markdown.replace(f"]({up}../", f"]({up}").replace(COMMANDS, _commands())
