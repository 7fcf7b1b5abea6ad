"""`overcrank engines`: look at a store and keep it in order."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from overcrank.cli_options import Command, Group, store_option


@click.group(cls=Group)
def engines() -> None:
    """Look at built bundles and keep their store in order."""


@engines.command("list", cls=Command)
@store_option
def engines_list(store: Path | None) -> None:
    """Every bundle in the store."""
    from overcrank.engines.show import print_list
    from overcrank.engines.store import Store

    print_list(Store(store))


@engines.command("show", cls=Command)
@click.argument("bundle")
@store_option
def engines_show(bundle: str, store: Path | None) -> None:
    """A bundle's manifest, readably, with its hashes checked (exit 1 if one is wrong)."""
    from overcrank.engines.show import print_bundle
    from overcrank.engines.store import Store

    if not print_bundle(Store(store).resolve(bundle)):
        sys.exit(1)


@engines.command("rm", cls=Command)
@click.argument("bundles", nargs=-1, required=True)
@store_option
def engines_rm(bundles: tuple[str, ...], store: Path | None) -> None:
    """Remove bundles."""
    from overcrank.engines.store import Store

    where = Store(store)
    for path in [where.resolve(b) for b in bundles]:
        where.remove(path)
        click.echo(f"removed {path}")


@engines.command("lint", cls=Command)
@click.argument("bundle")
@click.option("--compare/--no-compare", default=True, help="Also compile a shallow network both ways and compare.")
@store_option
def engines_lint(bundle: str, compare: bool, store: Path | None) -> None:
    """What a bundle's plans do: kernels, GEMM epilogues, work on weights at run time."""
    from overcrank.engines.lint import print_lint
    from overcrank.engines.store import Store

    print_lint(Store(store).resolve(bundle), compare)


@engines.command("fsck", cls=Command)
@click.option("--repair", is_flag=True, help="Remove what is wrong; what is missed is made again when it is needed.")
@store_option
def engines_fsck(repair: bool, store: Path | None) -> None:
    """Read every file of the store and name what is damaged or left over (exit 1 if something is)."""
    from overcrank.engines.report import human_bytes
    from overcrank.engines.store import Store
    from overcrank.runtime.upkeep import flaws, print_items, remove

    where = Store(store)
    found = list(flaws(where))
    print_items(found, where)
    if not found:
        click.echo(f"{where.root}: nothing is wrong in {len(where.list())} bundles and what is kept beside them")
    elif repair:
        click.echo(f"removed {len(found)}, {human_bytes(remove(found))}")
    else:
        click.echo(f"{len(found)} things are wrong; --repair removes them", err=True)
        sys.exit(1)


@engines.command("gc", cls=Command)
@click.option("--older-than", metavar="AGE", help="Also what was not used for so long, such as 30d or 12h.")
@click.option("--max-size", metavar="SIZE", help="Also the longest unused, until no more than this is kept.")
@click.option("--other-versions", is_flag=True, help="Also bundles made by another TensorRT than the installed one.")
@click.option("--dry-run", is_flag=True, help="Only show what would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@store_option
def engines_gc(
    older_than: str | None,
    max_size: str | None,
    other_versions: bool,
    dry_run: bool,
    yes: bool,
    store: Path | None,
) -> None:
    """Remove what nobody needs: leavings, caches of engines that are gone, and what the options name."""
    from overcrank.engines.report import human_bytes
    from overcrank.engines.store import Store
    from overcrank.runtime.upkeep import bytes_of, print_items, removable, remove, seconds_of

    where = Store(store)
    age = seconds_of(older_than) if older_than is not None else None
    size = bytes_of(max_size) if max_size is not None else None
    found = removable(where, age, size, other_versions)
    print_items(found, where)
    total = human_bytes(sum(item.bytes for item in found))
    if not found or dry_run:
        click.echo(f"{len(found)} things would go, {total}" if found else "nothing to remove")
        return
    if not yes and not click.confirm(f"remove {len(found)} things, {total}?"):
        click.echo("nothing was removed")
        return
    click.echo(f"removed {len(found)}, {human_bytes(remove(found))}")


@engines.command("sign", cls=Command)
@click.argument("bundles", nargs=-1, required=True)
@click.option("--key", required=True, help="Name of a key of one's own (overcrank keys new).")
@store_option
def engines_sign(bundles: tuple[str, ...], key: str, store: Path | None) -> None:
    """Sign bundles whose files are whole, so that others can use them."""
    from overcrank.engines.manifest import check_files, read_manifest
    from overcrank.engines.store import Store
    from overcrank.engines.trust import Keyring
    from overcrank.errors import IntegrityError

    where = Store(store)
    for path in [where.resolve(b) for b in bundles]:
        if wrong := check_files(path, read_manifest(path)):
            raise IntegrityError(f"{path.name} is not signed: {wrong[0]}; rebuild it.")
        made = Keyring().sign(path, key)
        click.echo(f"signed {path.name} by {made.name}, {made.key[:16]}")
