"""The command line: `overcrank` and `build-engine`."""

from overcrank.cli.app import build_engine, main

__all__ = ["build_engine", "main"]
