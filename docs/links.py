"""What the site needs beside docs/: pages from elsewhere, links that work there too, the package's source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "bench/results/*.md", "examples/*.py", "examples/*.ipynb")
SOURCES = ROOT / ".cache" / "docs" / "overcrank"


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


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """In the repository docs/ is one folder deeper than on the site, where it is the root."""
    source = page.file.src_uri
    if source in _outside():
        return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
    up = "../" * source.count("/")
    return markdown.replace(f"]({up}../", f"]({up}")
