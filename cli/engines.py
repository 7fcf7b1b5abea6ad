"""`overcrank engines`: look at a store and keep it in order."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from overcrank.cli.completion import BUNDLE, CARD, MODEL
from overcrank.cli.json_output import json_option, print_json
from overcrank.cli.options import SOME_FAILED, Command, Group, echo, ray_option, store_option
from overcrank.errors import UserError
from overcrank.options import option

if TYPE_CHECKING:
    from overcrank.engines.matrix import Cell
    from overcrank.engines.workers import Workers


@click.group(cls=Group)
def engines() -> None:
    """Look at built bundles and keep their store in order."""


@engines.command("list", cls=Command)
@json_option
@store_option
def engines_list(as_json: bool, store: Path | None) -> None:
    """Every bundle in the store."""
    from overcrank.cli.bundles import listed, print_list
    from overcrank.engines.store import Store

    if as_json:
        print_json("engines list", bundles=listed(Store(store)))
    else:
        print_list(Store(store))


@engines.command("build", cls=Command)
@click.option("--models", default="", help="Families, variants, folders or hub ids, with commas.")
@click.option("--gpus", default="all", show_default=True, help="As --gpu of build-engine, with commas.")
@click.option(
    "--precisions", default="auto", show_default=True, help="auto, fp16, bf16, fp8, int8, nvfp4, with commas."
)
@click.option("--layout", multiple=True, help="As --layout of build-engine; repeatable.")
@click.option("--static", is_flag=True, help="Serve each model's native shape only.")
@click.option("--retry-failed", is_flag=True, help="What the last such command did not manage, in place of --models.")
@click.option("--index", type=click.Path(path_type=Path, dir_okay=False), help="Write a Markdown table of the bundles.")
@click.option("--jobs", "-j", type=click.IntRange(min=1), help="Worker processes [default: by cores and RAM].")
@ray_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@store_option
def engines_build(**options: Any) -> None:
    """Build every possible combination of MODELS, GPUS and PRECISIONS; the same command resumes."""
    from overcrank.cli.display import building
    from overcrank.engines import matrix
    from overcrank.engines.store import Store

    store = Store(options["store"])
    cells = matrix.failed_before(store) if options["retry_failed"] else _asked(options)
    plan = matrix.expanded(cells, options["static"])
    with ExitStack() as stack:
        hire, count = _workers(options, stack)
        for line in matrix.plan_lines(plan, store, count):
            click.echo(line, err=True)
        if not (options["yes"] or options["as_json"]) and not click.confirm("build them?", err=True):
            return
        progress = stack.enter_context(building(options["as_json"]))
        result = matrix.run(plan, store, progress, hire)
    if options["index"] is not None:
        matrix.write_index(options["index"], result)
    if options["as_json"]:
        print_json("engines build", **matrix.reported(result))
    else:
        click.echo("\n".join(matrix.result_lines(result)))
    if result.failed:
        sys.exit(SOME_FAILED if result.built else 1)


def _asked(options: dict[str, Any]) -> list[Cell]:
    """Every combination, a layout's files by the names that `--weights` takes."""
    from overcrank.engines.matrix import cells_of

    layout = options["layout"]
    if layout and len(options["models"].replace(",", " ").split()) != 1:
        raise UserError(f"{option('layout', layout[0])} is of one model; give that alone in {option('models')}.")
    if layout:
        from overcrank.runtime.pipeline.naming import layout_words

        layout = layout_words(options["models"].strip(" ,"), layout)
    return cells_of(options["models"], options["gpus"], options["precisions"], layout)


def _workers(options: dict[str, Any], stack: ExitStack) -> tuple[Callable[[], Workers], int]:
    """Who builds, here or on a cluster that `stack` leaves, and how many at a time."""
    from overcrank.engines.cluster import RayWorkers, connected
    from overcrank.engines.workers import LocalWorkers, default_workers

    if options["ray"]:
        ray = stack.enter_context(connected(options["ray"]))
        count = options["jobs"] or max(1, int(ray.cluster_resources().get("CPU", 0)))
        return partial(RayWorkers, ray, count), count
    count = options["jobs"] or default_workers()
    return partial(LocalWorkers, count), count


@engines.command("show", cls=Command)
@click.argument("bundle", type=BUNDLE)
@json_option
@store_option
def engines_show(bundle: str, as_json: bool, store: Path | None) -> None:
    """A bundle's manifest, readably, with its hashes checked (exit 1 if one is wrong)."""
    from overcrank.cli.bundles import print_bundle, signed
    from overcrank.engines.manifest import check_files, read_manifest
    from overcrank.engines.store import Store

    path = Store(store).resolve(bundle)
    if as_json:
        problems = check_files(path, manifest := read_manifest(path))
        print_json("engines show", path=path, manifest=manifest, signed=signed(path), problems=problems)
    if not (print_bundle(path) if not as_json else not problems):
        sys.exit(1)


@engines.command("rm", cls=Command)
@click.argument("bundles", type=BUNDLE, nargs=-1, required=True)
@store_option
def engines_rm(bundles: tuple[str, ...], store: Path | None) -> None:
    """Remove bundles."""
    from overcrank.engines.store import Store

    where = Store(store)
    for paths in [where.removal(b) for b in bundles]:
        where.remove(paths)
        click.echo(f"removed {paths[0]}")


@engines.command("lint", cls=Command)
@click.argument("bundle", type=BUNDLE)
@click.option("--compare/--no-compare", default=True, help="Also compile a shallow network both ways and compare.")
@json_option
@store_option
def engines_lint(bundle: str, compare: bool, as_json: bool, store: Path | None) -> None:
    """What a bundle's plans do: kernels, GEMM epilogues, work on weights at run time."""
    from overcrank.cli.bundles import lint_report, print_lint
    from overcrank.engines.store import Store

    path = Store(store).resolve(bundle)
    if as_json:
        print_json("engines lint", **lint_report(path, compare))
    else:
        print_lint(path, compare)


@engines.command("fsck", cls=Command)
@click.option("--repair", is_flag=True, help="Remove what is wrong; what is missed is made again when it is needed.")
@json_option
@store_option
def engines_fsck(repair: bool, as_json: bool, store: Path | None) -> None:
    """Read every file of the store and name what is damaged or left over (exit 1 if something is)."""
    from overcrank.cli.bundles import described, print_items
    from overcrank.engines.maintenance import find_problems, remove
    from overcrank.engines.store import Store
    from overcrank.units import human_bytes

    where = Store(store)
    problems = list(find_problems(where))
    if as_json:
        items = described(problems)
        print_json("engines fsck", problems=items, removed=remove(problems, where) if repair else 0)
        sys.exit(1 if problems and not repair else 0)
    print_items(problems, where)
    if not problems:
        click.echo(f"OK: {len(where.list())} bundles and their caches in {where.root} verified")
    elif repair:
        click.echo(f"removed {len(problems)}, {human_bytes(remove(problems, where))}")
    else:
        click.echo(f"{len(problems)} items are damaged or left over; --repair deletes them", err=True)
        sys.exit(1)


@engines.command("gc", cls=Command)
@click.option("--older-than", metavar="AGE", help="Also what was not used for that long, such as 30d or 12h.")
@click.option(
    "--max-size", metavar="SIZE", help="Also the longest unused, until the store is no larger than this, such as 50GB."
)
@click.option("--other-versions", is_flag=True, help="Also bundles made by another TensorRT than the installed one.")
@click.option(
    "--gone-host",
    "gone_hosts",
    multiple=True,
    metavar="HOST",
    help="Also unfinished work of this machine, which you know to be gone; repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@store_option
def engines_gc(
    dry_run: bool, yes: bool, as_json: bool, store: Path | None, gone_hosts: tuple[str, ...], **unneeded: Any
) -> None:
    """Delete unused files: interrupted downloads and builds, caches of deleted engines, and what the options name."""
    from overcrank.cli.bundles import described, print_items
    from overcrank.engines.maintenance import removable, remove, unknown_owners
    from overcrank.engines.store import Store
    from overcrank.units import human_bytes, parse_age, parse_size

    where = Store(store)
    older_than, max_size = unneeded["older_than"], unneeded["max_size"]
    age = parse_age(older_than, "--older-than") if older_than is not None else None
    size = parse_size(max_size, "--max-size") if max_size is not None else None
    if as_json and not (yes or dry_run):
        raise UserError("--json asks nothing: add --yes to remove, or --dry-run to see what would be removed.")
    gone = frozenset(gone_hosts)
    items = removable(where, age, size, unneeded["other_versions"], gone)
    for host, count in unknown_owners(where).items():
        if host not in gone_hosts:
            echo(
                f"note: {count} unfinished of {host} stay; if no process there works on them: --gone-host {host}", True
            )
    if as_json:
        rows = described(items)
        print_json("engines gc", items=rows, removed=0 if dry_run else remove(items, where, gone))
        return
    print_items(items, where)
    total = human_bytes(sum(item.bytes for item in items))
    if not items or dry_run:
        click.echo(f"{len(items)} items would be removed, {total}" if items else "nothing to remove")
        return
    if not yes and not click.confirm(f"remove {len(items)} items, {total}?"):
        click.echo("nothing was removed")
        return
    click.echo(f"removed {len(items)}, {human_bytes(remove(items, where, gone))}")


@engines.command("sign", cls=Command)
@click.argument("bundles", type=BUNDLE, nargs=-1, required=True)
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
        echo(f"signed {path.name} by {key}, {Keyring().sign(path, key)[:16]}")


@engines.command("push", cls=Command)
@click.argument("url")
@click.argument("bundles", type=BUNDLE, nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every bundle in the store, in place of BUNDLES.")
@click.option("--key", required=True, help="Name of a key of one's own (overcrank keys new).")
@json_option
@store_option
def engines_push(url: str, bundles: tuple[str, ...], every: bool, key: str, as_json: bool, store: Path | None) -> None:
    """Sign BUNDLES and publish them at URL: a folder, s3://, gs://, hf:// or what else fsspec writes to."""
    from overcrank.api import push
    from overcrank.cli.bundles import published
    from overcrank.cli.display import transferring
    from overcrank.engines.place import shown
    from overcrank.units import human_bytes

    if every == bool(bundles):
        raise UserError("push takes either BUNDLES, by name or a part of it, or --all.")
    with transferring() as progress:
        entries = push(url, None if every else bundles, key, store=store, progress=progress)
    if as_json:
        print_json("engines push", url=shown(url), bundles=[published(listed) for listed in entries])
        return
    for listed in entries:
        echo(f"published {listed.name}, {human_bytes(listed.bytes)}")


@engines.command("pull", cls=Command)
@click.argument("url")
@click.option("--model", type=MODEL, required=True, help="Family or variant, as 'engines search' shows it.")
@click.option(
    "--gpu", type=CARD, default="auto", show_default=True, help="auto for the card in this machine, or as build-engine."
)
@click.option("--precision", default="auto", show_default=True, help="auto, fp16, bf16, fp8, int8, nvfp4.")
@click.option("--allow-unsigned", is_flag=True, help="Also what nobody trusted has signed: you vouch for URL.")
@click.option("--follow", is_flag=True, help="Also where URL redirects to another host.")
@json_option
@store_option
def engines_pull(url: str, model: str, as_json: bool, store: Path | None, **options: Any) -> None:
    """Fetch the bundle that serves this card from URL, checked and signed by someone trusted."""
    from overcrank.api import PullOptions, pull
    from overcrank.cli.bundles import published
    from overcrank.cli.display import transferring
    from overcrank.engines.manifest import read_manifest
    from overcrank.engines.place import shown
    from overcrank.engines.remote import listed_as

    with transferring() as progress:
        path = pull(url, model, PullOptions(**options), store=store, progress=progress)
    if as_json:
        print_json("engines pull", url=shown(url), path=path, bundle=published(listed_as(path, read_manifest(path))))
    else:
        echo(path)


@engines.command("search", cls=Command)
@click.argument("url")
@click.option("--model", type=MODEL, default="", help="Family or variant, as for build-engine [default: all].")
@click.option("--follow", is_flag=True, help="Also where URL redirects to another host.")
@json_option
@store_option
def engines_search(url: str, model: str, follow: bool, as_json: bool, store: Path | None) -> None:
    """What is published at URL."""
    from overcrank.api import search
    from overcrank.cli.bundles import published
    from overcrank.engines.place import shown
    from overcrank.units import human_bytes

    bundles = search(url, model, follow=follow)
    if as_json:
        print_json("engines search", url=shown(url), bundles=[published(listed) for listed in bundles])
        return
    for listed in bundles:
        words = (listed.model, listed.target, listed.precision, f"{listed.flavour} {listed.flavour_version}")
        echo(f"{'  '.join(words)}  {human_bytes(listed.bytes)}  {listed.name}")
