"""What a shell offers for models, cards and bundles (docs/json.md says how it is switched on)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem


class Named(click.types.StringParamType):
    """Text, of which these are some; they are asked for only by a shell."""

    def __init__(self, names: Callable[[click.Context], Iterable[str]]) -> None:
        self._names = names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self._names(ctx) if name.startswith(incomplete)]


def _models(_: click.Context) -> list[str]:
    from overcrank.models import families, family

    return [name for f in families() for name in (f, *(v.name for v in family(f).variants))]


def _cards(_: click.Context) -> list[str]:
    from overcrank.engines.targets import TARGETS

    return ["auto", "all", *(name for target in TARGETS for name in (target.name, *target.cards))]


def _bundles(context: click.Context) -> list[str]:
    from overcrank.engines.store import Store

    return [path.name for path, _ in Store(context.params.get("store")).list()]


MODEL, CARD, BUNDLE = Named(_models), Named(_cards), Named(_bundles)
