"""`overcrank keys`: who may sign bundles that are used here."""

from __future__ import annotations

from pathlib import Path

import click
from overcrank.cli.json_output import json_option, print_json
from overcrank.cli.options import Command, Group

LONGEST = 4096
"""Bytes of a file with a public key that are read."""


@click.group(cls=Group)
def keys() -> None:
    """Keys of one's own, and the publishers that are trusted here."""


@keys.command("new", cls=Command)
@click.argument("name")
def keys_new(name: str) -> None:
    """A key pair to sign bundles with; prints the line that others trust."""
    from overcrank.engines.trust import Keyring

    ring = Keyring()
    publisher = ring.new(name)
    click.echo(f"private key {ring.folder / f'{name}.key'}: keep it to yourself", err=True)
    click.echo(publisher.line())


@keys.command("trust", cls=Command)
@click.argument("key", nargs=-1, required=True)
def keys_trust(key: tuple[str, ...]) -> None:
    """Trust a publisher: KEY is the line that `keys new` printed, or a file that holds it."""
    from overcrank.engines.trust import Keyring, fingerprint

    line = " ".join(key)
    if len(key) == 1 and Path(key[0]).is_file():
        with Path(key[0]).open("rb") as stream:
            line = stream.read(LONGEST).decode("utf-8", errors="replace")
    publisher = Keyring().trust(line)
    click.echo(f"trusted {publisher.name}, {fingerprint(publisher.public)}")


@keys.command("list", cls=Command)
@json_option
def keys_list(as_json: bool) -> None:
    """Every key that is or was trusted here."""
    from overcrank.engines.trust import Keyring

    publishers = Keyring().publishers()
    if as_json:
        print_json("keys list", keys=[{"fingerprint": name, **p.model_dump()} for name, p in publishers.items()])
        return
    for name, publisher in publishers.items():
        state = f"revoked {publisher.revoked}" if publisher.revoked else f"trusted since {publisher.added}"
        click.echo(f"{name[:16]}  {publisher.name}: {state}")
    if not publishers:
        click.echo("no keys; bundles built here need none, those from elsewhere are refused")


@keys.command("revoke", cls=Command)
@click.argument("key")
def keys_revoke(key: str) -> None:
    """Trust a key no longer: its name, or the beginning of its fingerprint."""
    from overcrank.engines.trust import Keyring

    click.echo(f"revoked {Keyring().revoke(key).name}; bundles it signed are refused from now on")
