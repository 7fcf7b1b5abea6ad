"""Publishing and pulling bundles: a folder, nginx that is killed meanwhile, S3; and what an attacker there can do."""

from __future__ import annotations

import base64
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from overcrank.engines.download import pull
from overcrank.engines.envelope import INDEX
from overcrank.engines.manifest import MANIFEST, PULLED, SIGNATURE, check_files, file_entry, read_manifest
from overcrank.engines.place import Remote
from overcrank.engines.remote import Index, fitting, push, read_index
from overcrank.engines.store import Store
from overcrank.engines.trust import Keyring
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
    listed = fitting(read_index(remote, ring), "ltx-demo", "sm_89", "bf16")
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
    from overcrank.engines.refusals import CannotServe
    from overcrank.models import components, resolve
    from overcrank.runtime.sessions.select import engine_of, fitting_bundles

    path = fetched(place, tmp_path / "store", ring)
    demo = resolve("ltx-demo")
    (denoiser,) = components(demo, ("denoiser",))
    fits = fitting_bundles([path], demo, "sm_89", "bf16")
    assert engine_of(denoiser, fits).folder == path
    ring.revoke("studio")
    with pytest.raises(CannotServe, match="whose key was revoked"):
        engine_of(denoiser, fits)


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
        index = read_index(Remote(url), ring)
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


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("gopher://somewhere/x", "gopher://somewhere/x is no place for engines"),
        ("reference://", "reference:// is no place for engines"),
        ("simplecache::http://somewhere/x", "is no place for engines"),
        ("http://", "it names no host"),
        ("http://[::1/x", "cannot be used: ValueError"),
        ("http://somewhere:port/x", "cannot be used: ValueError"),
        ("https://somewhere/x?token=geheim", "https://somewhere/x cannot be used: ValueError: it has a query"),
        ("https://somewhere/x#here", "it has a query or a fragment"),
    ],
)
def test_urls_that_are_none(url: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        Remote(url)
    assert says in str(refused.value)
    assert "geheim" not in str(refused.value)


def test_one_place_has_one_spelling() -> None:
    spellings = ["https://Host.example/a//b/", "http://host.example:80/a/b", "HTTPS://host.example:443/a/./b"]
    spellings += ["https://user:pass@host.example./a/c/../b", "https://host.example/%61/b"]
    assert {Remote(url).place for url in spellings} == {"https://host.example/a/b"}
    assert Remote("https://host.example/a/B").place != Remote("https://host.example/a/b").place


def payload_of(place: Path) -> Any:
    return json.loads(base64.b64decode(json.loads((place / "index.json").read_text())["payload"]))


def _edited(place: Path, ring: Keyring, change: Callable[[dict[str, Any]], None]) -> None:
    """The index changed and signed by the publisher, whose tools were deceived."""
    payload = payload_of(place)
    change(payload)
    (place / "index.json").write_bytes(ring.seal(INDEX, json.dumps(payload).encode(), "studio")[0])


def _unsigned_change(place: Path, ring: Keyring) -> None:
    envelope = json.loads((place / "index.json").read_text())
    changed = base64.b64decode(envelope["payload"]).replace(b"sm_89", b"sm_86")
    (place / "index.json").write_text(json.dumps(envelope | {"payload": base64.b64encode(changed).decode()}))


def _stranger(place: Path, ring: Keyring) -> None:
    other = Keyring(place.parent / "stranger")
    other.new("studio")
    (place / "index.json").write_bytes(other.seal(INDEX, json.dumps(payload_of(place)).encode(), "studio")[0])


def _other_document(place: Path, ring: Keyring) -> None:
    """What the publisher signed as something else, as an index."""
    payload = json.dumps(payload_of(place)).encode()
    envelope = json.loads(ring.seal("text/plain", payload, "studio")[0])
    (place / "index.json").write_text(json.dumps(envelope | {"payloadType": INDEX}))


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


def _many_names(place: Path, ring: Keyring) -> None:
    """One blob under 200,000 names."""

    def edit(payload: dict[str, Any]) -> None:
        (listed,) = payload["bundles"].values()
        listed["files"] += [{**listed["files"][0], "name": f"f{i}"} for i in range(200_000)]

    _edited(place, ring, edit)


def _more_files(place: Path, ring: Keyring) -> None:
    """More of them than the manifest has."""

    def edit(payload: dict[str, Any]) -> None:
        (listed,) = payload["bundles"].values()
        listed["files"] += [{**listed["files"][0], "name": f"f{i}"} for i in range(100)]

    _edited(place, ring, edit)


def _swapped_manifest(place: Path, ring: Keyring) -> None:
    """A manifest of the attacker's in place of the signed one, in an index whose publisher was deceived."""
    (listed,) = payload_of(place)["bundles"].values()
    digest = next(f["sha256"] for f in listed["files"] if f["name"] == MANIFEST)
    blob = place / "blobs" / digest[:2] / digest
    other = place / "other"
    other.write_text(json.dumps(json.loads(blob.read_text()) | {"peak_ram_bytes": 7}))
    entry = file_entry(other)
    (place / "blobs" / entry.sha256[:2]).mkdir(exist_ok=True)
    other.rename(place / "blobs" / entry.sha256[:2] / entry.sha256)

    def edit(payload: dict[str, Any]) -> None:
        (listed,) = payload["bundles"].values()
        listed["files"] = [f for f in listed["files"] if f["name"] != MANIFEST]
        listed["files"].append({"name": MANIFEST, "bytes": entry.bytes, "sha256": entry.sha256})

    _edited(place, ring, edit)


NO_INDEX = r"index\.json is signed and is no index \("
ATTACKS: dict[str, tuple[Callable[[Path, Keyring], None], type[OvercrankError], str]] = {
    "index changed": (_unsigned_change, IntegrityError, "the signature of 'studio' is not of this content"),
    "index signed by a stranger of the same name": (_stranger, IntegrityError, "which is not trusted here"),
    "another document as an index": (_other_document, IntegrityError, "signature of 'studio' is not of this content"),
    "a file's bit flipped": (_blob_changed, IntegrityError, "denoiser.engine from .* does not match its SHA-256"),
    "a file without end": (_blob_longer, IntegrityError, "is longer than the .* bytes it may have"),
    "a file gone": (_blob_gone, IntegrityError, "lacks denoiser.engine, which its index lists"),
    "bundle name with ..": (_name("../outside"), IntegrityError, NO_INDEX + r"bundles\..*\.name: String should match"),
    "bundle name absolute": (_name("/tmp/outside"), IntegrityError, NO_INDEX + r"bundles\..*\.name: String should"),
    "bundle name hidden": (_name(".outside"), IntegrityError, NO_INDEX + r"bundles\..*\.name: String should match"),
    "file name with ..": (_file("name", "../outside.engine"), IntegrityError, NO_INDEX + r"bundles\..*files\.0\.name"),
    "file name absolute": (_file("name", "/tmp/outside"), IntegrityError, NO_INDEX + r"bundles\..*files\.0\.name"),
    "file name is the manifest's": (_file("name", "manifest.json"), IntegrityError, "or has a file twice"),
    "hash with a path": (
        _file("sha256", "../../etc/passwd"),
        IntegrityError,
        NO_INDEX + r"bundles\..*files\.0\.sha256",
    ),
    "a size of minus one": (_file("bytes", -1), IntegrityError, NO_INDEX + r"bundles\..*files\.0\.bytes"),
    "a size of an exabyte": (_file("bytes", 10**18), IntegrityError, NO_INDEX + r"bundles\..*files\.0\.bytes"),
    "a size of a petabyte": (_file("bytes", 10**15), IntegrityError, "the index describes another bundle"),
    "engine offered for more cards": (_other_card, IntegrityError, "the index describes another bundle"),
    "one blob under 200,000 names": (_many_names, IntegrityError, NO_INDEX + r"bundles\..*files: List should have"),
    "more files than the manifest has": (_more_files, IntegrityError, "the index describes another bundle"),
    "a manifest that was not signed": (_swapped_manifest, IntegrityError, "its signature is of another manifest.json"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_of_an_attack_is_accepted(attack: str, place: Path, tmp_path: Path, ring: Keyring) -> None:
    change, kind, says = ATTACKS[attack]
    change(place, ring)
    with pytest.raises(kind, match=says) as refused:
        fetched(place, tmp_path / "store", ring)
    assert type(refused.value) is kind
    bundles = tmp_path / "store" / "bundles"
    assert not bundles.exists() or not [p for p in bundles.iterdir() if not p.name.startswith(".")]
    assert not list(tmp_path.glob("**/outside*"))
    large = [p for p in tmp_path.glob("store/**/*") if p.is_file() and p.stat().st_size > 10**7]
    assert not large, "what nobody vouched for was written"


def test_an_old_index_is_refused_once_a_newer_was_seen(
    place: Path, demo_bundle: Path, tmp_path: Path, ring: Keyring
) -> None:
    old = (place / "index.json").read_bytes()
    push(Remote(str(place)), [copied(demo_bundle, tmp_path / "more", "second")], "studio", ring, silent)
    remote = Remote(str(place))
    assert set(read_index(remote, ring).bundles) == {demo_bundle.name, "second"}
    (place / "index.json").write_bytes(old)
    with pytest.raises(IntegrityError, match="is number 1 and number 2 was seen before"):
        read_index(Remote(f"file://{place}/"), ring)  # another spelling, and no store is asked


def test_pushes_at_once_lose_nothing(demo_bundle: Path, tmp_path: Path, ring: Keyring) -> None:
    own = [copied(demo_bundle, tmp_path / f"machine{i}", f"bundle{i}") for i in range(6)]
    place = str(tmp_path / "place")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda bundle: push(Remote(place), [bundle], "studio", ring, silent), own))
    index = read_index(Remote(place), ring)
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
            "no engine of svd-xt-1.1 is published there, but ltx-demo; build it: build-engine --model svd",
        ),
        ("ltx-demo", "sm_86", "bf16", "published for sm_89 bf16, not for sm_86 bf16; build it"),
        ("ltx-demo", "sm_89", "fp8", "published for sm_89 bf16, not for sm_89 fp8"),
    ],
)
def test_the_nearest_is_named(
    model: str, card: str, precision: str, says: str, place: Path, tmp_path: Path, ring: Keyring
) -> None:
    index = read_index(Remote(str(place)), ring)
    with pytest.raises(UserError, match=says):
        fitting(index, model, card, precision)


def test_the_card_s_own_and_the_installed_version_come_first(place: Path, tmp_path: Path, ring: Keyring) -> None:
    index = read_index(Remote(str(place)), ring)
    (own,) = index.bundles.values()
    portable = own.model_copy(update={"name": "portable", "target": "rtx", "created": "2999"})
    later = own.model_copy(update={"name": "later", "created": "2998"})
    foreign = own.model_copy(update={"name": "foreign", "created": "2999", "flavour_version": "0.1"})

    def chosen(*bundles: Any, card: str = "sm_89") -> str:
        known = {b.name: b for b in bundles}
        return fitting(Index(serial=1, updated="", bundles=known), "ltx-demo", card, "bf16").name

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
    assert "is signed by the key " in refused.output
    assert "which is not trusted here" in refused.output
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
    assert "which is not trusted here" in run("overcrank", *words).output
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
    with pytest.raises(IntegrityError, match="which is not trusted here"):
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


def test_a_damaged_bundle_in_the_store_is_mended(place: Path, tmp_path: Path, ring: Keyring, monkeypatch: Any) -> None:
    path = fetched(place, tmp_path / "store", ring)
    (path / "denoiser.onnx").write_bytes(b"damaged")
    asked: list[str] = []
    opened = Remote.open
    monkeypatch.setattr(Remote, "open", lambda self, *a: asked.append(a[-1]) or opened(self, *a))
    assert fetched(place, tmp_path / "store", ring) == path
    assert check_files(path, read_manifest(path)) == []
    graph = file_entry(path / "denoiser.onnx").sha256
    assert [name for name in asked if name != "index.json"] == [graph], "what was whole is not fetched again"
    assert not list(path.parent.glob(".*"))


def test_an_unsigned_bundle_does_not_pass_for_a_signed_one(
    place: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch, ring: Keyring
) -> None:
    words = ["engines", "pull", place, "--model", "ltx-demo", "--gpu", "sm_89", "--store", tmp_path / "store"]
    line = next(iter(ring.publishers().values())).line()
    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "customer"))
    unsigned = run("overcrank", *words, "--allow-unsigned")
    path = Path(unsigned.stdout.strip())
    assert "unsigned" in json.loads((path / PULLED).read_text())
    (path / SIGNATURE).write_text("{}")
    assert run("overcrank", *words).exit_code == 1
    run("overcrank", "keys", "trust", *line.split())
    pulled = run("overcrank", *words)
    assert pulled.exit_code == 0, pulled.output
    who = Keyring().check(path)
    assert who is not None
    assert who.name == "studio"
    assert "unsigned" not in json.loads((path / PULLED).read_text())


def test_push_mends_a_rotten_blob_of_the_same_size(
    place: Path, demo_bundle: Path, tmp_path: Path, ring: Keyring
) -> None:
    _blob_changed(place, ring)
    with pytest.raises(IntegrityError, match="does not match its SHA-256"):
        fetched(place, tmp_path / "store", ring)
    before = {p: p.stat().st_mtime_ns for p in (place / "blobs").glob("*/*")}
    push(Remote(str(place)), [copied(demo_bundle, tmp_path / "again")], "studio", ring, silent)
    rewritten = [p for p, when in before.items() if p.stat().st_mtime_ns != when]
    assert [p.name for p in rewritten] == [file_entry(demo_bundle / "denoiser.engine").sha256]
    assert fetched(place, tmp_path / "store", ring).is_dir()


def test_a_word_means_the_same_model_as_everywhere(place: Path, tmp_path: Path, run: Any, ring: Keyring) -> None:
    """The family's name is its default variant, and not the newest bundle of the family."""
    index = read_index(Remote(str(place)), ring)
    with pytest.raises(UserError, match=r"no engine of ltx-2b-0\.9\.\S+ is published there, but ltx-demo"):
        fitting(index, "ltx", "sm_89", "bf16")
    own = next(iter(index.bundles.values())).model_copy(update={"name": "tuned", "model": "my-own"})
    index = index.model_copy(update={"bundles": {**index.bundles, "tuned": own}})
    assert fitting(index, "my-own", "sm_89", "bf16").name == "tuned"
    assert "ltx-demo" in run("overcrank", "engines", "search", place, "--model", "ltx-demo").output
    assert run("overcrank", "engines", "search", place, "--model", "ltx").output == ""


def test_a_pull_is_for_one_card(place: Path, run: Any, tmp_path: Path) -> None:
    result = run(
        "overcrank", "engines", "pull", place, "--model", "ltx-demo", "--gpu", "all", "--store", tmp_path / "s"
    )
    assert result.exit_code == 2
    assert "--gpu all stands for " in result.output
    assert "a pull is for one of them" in result.output


def test_a_list_of_seen_indexes_that_is_lost_is_not_empty(place: Path, ring: Keyring) -> None:
    read_index(Remote(str(place)), ring)
    (ring.folder / "seen.json").write_text("")
    with pytest.raises(UserError, match=r"seen\.json cannot be read as the numbers of the indexes that were seen"):
        read_index(Remote(str(place)), ring)


def test_an_unsigned_index_is_not_remembered(place: Path, ring: Keyring) -> None:
    """Else a stranger's number would shut out the publisher's own."""
    good = (place / "index.json").read_bytes()
    _edited(place, ring, lambda payload: payload.update(serial=2**50))
    read_index(Remote(str(place)), ring, unsigned=True)
    (place / "index.json").write_bytes(good)
    assert read_index(Remote(str(place)), ring).serial == 1


def test_everything_is_pushed_and_parts_of_names_are_enough(
    demo_bundle: Path, tmp_path: Path, run: Any, ring: Keyring
) -> None:
    store, place = Store(tmp_path / "own"), tmp_path / "place"
    for name in ("one-sm_89", "two-sm_89", "two-sm_86"):
        copied(demo_bundle, store.bundles, name)
    words = ["engines", "push", place, "--key", "studio", "--store", store.root]
    for bundles, says in (([], "or --all"), (["one", "--all"], "or --all"), (["two"], "several bundles match 'two'")):
        refused = run("overcrank", *words, *bundles)
        assert refused.exit_code == 2
        assert says in refused.output
    assert "published two-sm_86" in run("overcrank", *words, "two*6").output
    assert "published one-sm_89" in run("overcrank", *words, "one").output
    assert set(read_index(Remote(str(place)), ring).bundles) == {"two-sm_86", "one-sm_89"}
    assert run("overcrank", *words, "--all").exit_code == 0
    assert len(read_index(Remote(str(place)), ring).bundles) == 3


def test_indexes_of_older_versions_are_read(place: Path, ring: Keyring) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from overcrank.engines.envelope import OLD_INDEX

    payload = json.dumps(payload_of(place))
    key: Any = load_pem_private_key((ring.folder / "studio.key").read_bytes(), None)
    signature = base64.b64encode(key.sign(OLD_INDEX + payload.encode())).decode()
    (who,) = ring.publishers()
    old = {"schema_version": 1, "key": who, "name": "studio", "signature": signature}
    (place / "index.json").write_text(json.dumps({"payload": payload, "signature": old}))
    assert read_index(Remote(str(place)), ring).serial == 1
    (place / "index.json").write_text(json.dumps({"payload": payload + " ", "signature": old}))
    with pytest.raises(IntegrityError, match="is not of this content"):
        read_index(Remote(str(place)), ring)
