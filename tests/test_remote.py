"""Publishing and pulling bundles: a folder, nginx that is killed meanwhile, S3; and what an attacker there can do."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from overcrank.engines.manifest import check_files, read_manifest
from overcrank.engines.remote import PURPOSE, Index, Remote, fitting, pull, push, read_index
from overcrank.engines.store import Store
from overcrank.engines.trust import PULLED, Keyring
from overcrank.errors import IntegrityError, OvercrankError, StoreError, UserError

from tests.servers import Nginx, s3


def silent(name: str, there: int, size: int) -> None: ...


@pytest.fixture
def ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keyring:
    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "config"))
    made = Keyring()
    made.new("studio")
    return made


@pytest.fixture
def place(demo_bundle: Path, tmp_path: Path, ring: Keyring) -> Path:
    """A folder where the bundle is published."""
    folder = tmp_path / "a place"
    push(Remote(str(folder)), [copied(demo_bundle, tmp_path / "own")], "studio", ring, silent)
    return folder


def copied(bundle: Path, folder: Path, name: str = "", **fields: Any) -> Path:
    """Under another name, and with a manifest that says something else."""
    where = folder / (name or bundle.name)
    shutil.copytree(bundle, where)
    manifest = json.loads((where / "manifest.json").read_text())
    (where / "manifest.json").write_text(json.dumps(manifest | fields))
    return where


def fetched(place: str | Path, store: Path, ring: Keyring) -> Path:
    remote, where = Remote(str(place)), Store(store)
    listed = fitting(read_index(remote, ring, where), "ltx-demo", "sm_89", "bf16")
    return pull(remote, listed, where, ring, silent)


def test_what_is_pushed_is_pulled_whole(place: Path, demo_bundle: Path, tmp_path: Path, ring: Keyring) -> None:
    path = fetched(place, tmp_path / "store", ring)
    assert path.name == demo_bundle.name
    assert check_files(path, read_manifest(path)) == []
    assert json.loads((path / PULLED).read_text()) == {"url": str(place)}
    assert (path / "denoiser.engine").read_bytes() == (demo_bundle / "denoiser.engine").read_bytes()
    assert fetched(place, tmp_path / "store", ring) == path
    assert not list((tmp_path / "store" / "bundles").glob(".*"))


def test_a_render_uses_what_was_pulled_until_its_key_is_revoked(place: Path, tmp_path: Path, ring: Keyring) -> None:
    from overcrank.engines.refusals import CannotServe, Untrusted
    from overcrank.models import components, resolve
    from overcrank.runtime.sessions.select import engine_of, fitting_bundles

    path = fetched(place, tmp_path / "store", ring)
    demo = resolve("ltx-demo")
    (denoiser,) = components(demo, ("denoiser",))
    fits = fitting_bundles([path], demo, "sm_89", "bf16")
    assert engine_of(denoiser, fits).folder == path
    ring.revoke("studio")
    with pytest.raises(CannotServe, match="whose key was revoked") as caught:
        engine_of(denoiser, fits)
    assert isinstance(caught.value.why, Untrusted)


@pytest.fixture
def nginx(place: Path, tmp_path: Path) -> Iterator[Nginx]:
    made = Nginx(place, tmp_path / "nginx")
    made.start()
    yield made
    made.kill()


def test_over_http(nginx: Nginx, tmp_path: Path, ring: Keyring) -> None:
    path = fetched(nginx.url, tmp_path / "store", ring)
    assert check_files(path, read_manifest(path)) == []
    assert all(" 200 " in line or " 206 " in line for line in nginx.served())


def test_a_connection_that_is_cut_goes_on_where_it_ended(nginx: Nginx, tmp_path: Path, ring: Keyring) -> None:
    """The server is killed while it sends a large file, and started again."""
    bundles = tmp_path / "store" / "bundles"

    def large() -> list[Path]:
        return [p for p in bundles.glob(".pulling-*/.*.part") if p.stat().st_size > 2**20]

    def cut() -> None:
        while not large():
            time.sleep(0.01)
        nginx.kill()

    nginx.kill()
    nginx.start(rate="4m")
    killer = threading.Thread(target=cut)
    killer.start()
    with pytest.raises(StoreError, match="the same command goes on from there"):
        fetched(nginx.url, tmp_path / "store", ring)
    killer.join()
    assert not list(bundles.glob("[!.]*"))
    (part,) = large()
    there, seen = part.stat().st_size, len(nginx.served())
    nginx.start()
    path = fetched(nginx.url, tmp_path / "store", ring)
    assert check_files(path, read_manifest(path)) == []
    name = part.name.strip(".").removesuffix(".part")
    again = [line.split("bytes=")[1] for line in nginx.served()[seen:] if name in line and "bytes=" in line]
    assert min(int(asked.partition("-")[0]) for asked in again) == there


def test_over_s3(demo_bundle: Path, tmp_path: Path, ring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s3" / "engines").mkdir(parents=True)
    with s3(tmp_path / "s3") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        url = "s3://engines/some/prefix"
        own = [copied(demo_bundle, tmp_path / f"machine{i}", f"bundle{i}") for i in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda bundle: push(Remote(url), [bundle], "studio", ring, silent), own))
        index = read_index(Remote(url), ring, Store(tmp_path / "store"))
        assert set(index.bundles) == {f"bundle{i}" for i in range(4)}
        path = fetched(url, tmp_path / "store", ring)
        assert check_files(path, read_manifest(path)) == []
        with pytest.raises(StoreError, match=r"s3://nothing cannot be read|has no index\.json"):
            fetched("s3://nothing", tmp_path / "store", ring)


def test_a_server_that_is_not_there(tmp_path: Path, ring: Keyring) -> None:
    with pytest.raises(StoreError, match=r"cannot be read"):
        fetched("http://127.0.0.1:9", tmp_path / "store", ring)
    with pytest.raises(StoreError, match=r"has no index.json: nothing is published there"):
        fetched(tmp_path / "empty", tmp_path / "store", ring)
    with pytest.raises(UserError, match="need their fsspec package"):
        Remote("gopher://somewhere/x")


def _edited(place: Path, ring: Keyring, change: Callable[[dict[str, Any]], None]) -> None:
    """The index changed and signed by the publisher, whose tools were deceived."""
    envelope = json.loads((place / "index.json").read_text())
    payload = json.loads(envelope["payload"])
    change(payload)
    text = json.dumps(payload)
    signature = ring.signature_of(PURPOSE + text.encode(), "studio").model_dump()
    (place / "index.json").write_text(json.dumps({"payload": text, "signature": signature}))


def _unsigned_change(place: Path, ring: Keyring) -> None:
    text = (place / "index.json").read_text()
    (place / "index.json").write_text(text.replace("sm_89", "sm_86"))


def _stranger(place: Path, ring: Keyring) -> None:
    other = Keyring(place.parent / "stranger")
    other.new("studio")
    payload = json.loads((place / "index.json").read_text())["payload"]
    signature = other.signature_of(PURPOSE + payload.encode(), "studio").model_dump()
    (place / "index.json").write_text(json.dumps({"payload": payload, "signature": signature}))


def _blob_changed(place: Path, ring: Keyring) -> None:
    largest = max((place / "blobs").glob("*/*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[1000] ^= 1
    largest.write_bytes(content)


def _blob_longer(place: Path, ring: Keyring) -> None:
    largest = max((place / "blobs").glob("*/*"), key=lambda p: p.stat().st_size)
    with largest.open("ab") as file:
        file.truncate(10**11)  # sparse


def _blob_gone(place: Path, ring: Keyring) -> None:
    max((place / "blobs").glob("*/*"), key=lambda p: p.stat().st_size).unlink()


def _name(value: str) -> Callable[[Path, Keyring], None]:
    def change(place: Path, ring: Keyring) -> None:
        def edit(payload: dict[str, Any]) -> None:
            (listed,) = payload["bundles"].values()
            listed["name"] = value

        _edited(place, ring, edit)

    return change


def _file(field: str, value: Any) -> Callable[[Path, Keyring], None]:
    def change(place: Path, ring: Keyring) -> None:
        def edit(payload: dict[str, Any]) -> None:
            (listed,) = payload["bundles"].values()
            listed["files"][0][field] = value

        _edited(place, ring, edit)

    return change


def _other_card(place: Path, ring: Keyring) -> None:
    """An engine for another card offered as one for this."""

    def edit(payload: dict[str, Any]) -> None:
        (listed,) = payload["bundles"].values()
        listed["target"], listed["model"] = "rtx", "ltx-demo"

    _edited(place, ring, edit)


ATTACKS: dict[str, tuple[Callable[[Path, Keyring], None], type[OvercrankError], str]] = {
    "index changed": (_unsigned_change, IntegrityError, "the signature of 'studio' is not of this content"),
    "index signed by a stranger of the same name": (_stranger, IntegrityError, "who is not trusted here"),
    "a file's bit flipped": (_blob_changed, IntegrityError, r"denoiser\.\w+ .*does not match its SHA-256"),
    "a file without end": (_blob_longer, IntegrityError, r"denoiser\.\w+ is longer than the index says"),
    "a file gone": (_blob_gone, IntegrityError, r"lacks denoiser\.\w+, which its index lists"),
    "bundle name with ..": (_name("../outside"), IntegrityError, r"a name that is not allowed: '\.\./outside'"),
    "bundle name absolute": (_name("/tmp/outside"), IntegrityError, "a name that is not allowed: '/tmp/outside'"),
    "bundle name hidden": (_name(".outside"), IntegrityError, r"a name that is not allowed: '\.outside'"),
    "file name with ..": (_file("name", "../outside.engine"), IntegrityError, r"not allowed: '\.\./outside\.engine'"),
    "file name absolute": (_file("name", "/tmp/outside.engine"), IntegrityError, "not allowed: '/tmp/outside.engine'"),
    "file name is the manifest's": (_file("name", "manifest.json"), IntegrityError, "or has a file twice"),
    "hash with a path": (_file("sha256", "../../../../etc/passwd"), IntegrityError, r"denoiser\.engine has no SHA-256"),
    "a size of minus one": (_file("bytes", -1), IntegrityError, r"denoiser\.engine has no SHA-256 or size"),
    "a size of an exabyte": (_file("bytes", 10**18), StoreError, r"bytes free and denoiser\.engine has"),
    "engine offered for more cards": (_other_card, IntegrityError, "the index describes another bundle"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_for_what_it_is(attack: str, place: Path, tmp_path: Path, ring: Keyring) -> None:
    change, kind, reason = ATTACKS[attack]
    change(place, ring)
    with pytest.raises(kind, match=reason):
        fetched(place, tmp_path / "store", ring)
    bundles = tmp_path / "store" / "bundles"
    assert not bundles.exists() or not [p for p in bundles.iterdir() if not p.name.startswith(".")]
    assert not list(tmp_path.glob("**/outside*"))


def test_an_old_index_is_refused_once_a_newer_was_seen(
    place: Path, demo_bundle: Path, tmp_path: Path, ring: Keyring
) -> None:
    old = (place / "index.json").read_bytes()
    push(Remote(str(place)), [copied(demo_bundle, tmp_path / "more", "second")], "studio", ring, silent)
    remote, store = Remote(str(place)), Store(tmp_path / "store")
    assert set(read_index(remote, ring, store).bundles) == {demo_bundle.name, "second"}
    (place / "index.json").write_bytes(old)
    with pytest.raises(IntegrityError, match="is number 1 and number 2 was seen before"):
        read_index(remote, ring, store)


def test_pushes_at_once_lose_nothing(demo_bundle: Path, tmp_path: Path, ring: Keyring) -> None:
    own = [copied(demo_bundle, tmp_path / f"machine{i}", f"bundle{i}") for i in range(6)]
    place = str(tmp_path / "place")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda bundle: push(Remote(place), [bundle], "studio", ring, silent), own))
    index = read_index(Remote(place), ring, Store(tmp_path / "store"))
    assert set(index.bundles) == {f"bundle{i}" for i in range(6)}
    assert len(list((tmp_path / "place" / "blobs").glob("*/*"))) == 2 + 2 * 6 - 2 * 5  # the same bytes are there once
    assert not list((tmp_path / "place").glob("**/.*.part"))


@pytest.mark.parametrize(
    ("model", "card", "precision", "says"),
    [
        (
            "svd",
            "sm_89",
            "bf16",
            "no engine of svd is published there, but ltx-demo; build it: build-engine --model svd",
        ),
        ("ltx-demo", "sm_86", "bf16", "published for sm_89 bf16, not for sm_86 bf16; build it"),
        ("ltx-demo", "sm_89", "fp8", "published for sm_89 bf16, not for sm_89 fp8"),
    ],
)
def test_the_nearest_is_named(
    model: str, card: str, precision: str, says: str, place: Path, tmp_path: Path, ring: Keyring
) -> None:
    index = read_index(Remote(str(place)), ring, Store(tmp_path / "store"))
    with pytest.raises(UserError, match=says):
        fitting(index, model, card, precision)


def test_the_card_s_own_and_the_installed_version_come_first(place: Path, tmp_path: Path, ring: Keyring) -> None:
    index = read_index(Remote(str(place)), ring, Store(tmp_path / "store"))
    (own,) = index.bundles.values()
    portable = own.model_copy(update={"name": "portable", "target": "rtx", "created": "2999"})
    later = own.model_copy(update={"name": "later", "created": "2998"})
    foreign = own.model_copy(update={"name": "foreign", "created": "2999", "flavour_version": "0.1"})

    def chosen(*bundles: Any, card: str = "sm_89") -> str:
        known = {b.name: b for b in bundles}
        return fitting(Index(serial=1, updated="", bundles=known), "ltx", card, "bf16").name

    assert chosen(own, portable, later, foreign) == "later"
    assert chosen(own, portable, card="sm_120") == "portable"
    with pytest.raises(UserError, match=r"is published for tensorrt_rtx 0\.1, which is not installed here"):
        chosen(foreign)


def test_commands(run: Any, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "publisher"))
    line = run("overcrank", "keys", "new", "studio").stdout.strip().splitlines()[-1]
    bundle, place = copied(demo_bundle, tmp_path / "own"), tmp_path / "place"
    pushed = run("overcrank", "engines", "push", place, bundle, "--key", "studio")
    assert pushed.exit_code == 0, pushed.output
    assert f"published {demo_bundle.name}" in pushed.output
    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "customer"))
    words = ["engines", "pull", place, "--model", "ltx-demo", "--gpu", "rtx4090", "--store", tmp_path / "store"]
    refused = run("overcrank", *words)
    assert refused.exit_code == 1
    assert "is signed by 'studio'" in refused.output
    run("overcrank", "keys", "trust", *line.split())
    found = run("overcrank", "engines", "search", place, "--store", tmp_path / "store")
    assert "ltx-demo  sm_89  bf16  tensorrt_rtx" in found.output
    pulled = run("overcrank", *words)
    assert pulled.exit_code == 0, pulled.output
    assert Path(pulled.stdout.strip()) == tmp_path / "store" / "bundles" / demo_bundle.name
    assert "by studio, " in run("overcrank", "engines", "show", pulled.stdout.strip()).output


def test_unsigned_only_when_its_user_vouches(
    place: Path, demo_bundle: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "customer"))
    words = ["engines", "pull", place, "--model", "ltx-demo", "--gpu", "sm_89", "--store", tmp_path / "store"]
    assert "who is not trusted here" in run("overcrank", *words).output
    blob = max((place / "blobs").glob("*/*"), key=lambda p: p.stat().st_size)
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + b"?")
    damaged = run("overcrank", *words, "--allow-unsigned")
    assert damaged.exit_code == 1
    assert "does not match its SHA-256" in damaged.output
    blob.write_bytes(content)
    pulled = run("overcrank", *words, "--allow-unsigned")
    assert pulled.exit_code == 0, pulled.output
    path = Path(pulled.stdout.strip())
    assert Keyring().check(path) is None
    (path / PULLED).write_text('{"url": "elsewhere"}')
    with pytest.raises(IntegrityError, match="who is not trusted here"):
        Keyring().check(path)


def test_a_render_pulls_what_the_store_lacks(
    place: Path, demo_bundle: Path, tmp_path: Path, ring: Keyring, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    from overcrank.engines import targets
    from overcrank.engines.cards import Card

    words = ["--prompt", "x", "--steps", 1, "--backend", "eager", "-o", tmp_path / "a.mp4", "--overwrite"]
    words += ["--store", tmp_path / "store"]
    without = run("overcrank", "render", *words, "--pull", place)
    assert without.exit_code == 0, without.output
    assert f"warning: --pull {place}: --gpu auto needs an NVIDIA card" in without.output
    cards = (Card(0, "NVIDIA GeForce RTX 4090", "sm_89", 0, 0, "580"),)
    monkeypatch.setattr(targets, "installed_cards", lambda: cards)
    again = run("overcrank", "render", *words, "--pull", place)
    assert again.exit_code == 0, again.output
    assert f"note: fetching {demo_bundle.name} from {place}" in again.output
    store = Store(tmp_path / "store")
    assert [p.name for p, _ in store.list()] == [demo_bundle.name]
    assert "fetching" not in run("overcrank", "render", *words, "--pull", tmp_path / "nowhere").output
