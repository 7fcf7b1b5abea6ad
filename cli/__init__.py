"""The command line: `overcrank` and `build-engine`."""

from overcrank.cli.app import main
from overcrank.cli.build import build_engine

__all__ = ["build_engine", "main"]
