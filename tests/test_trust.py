"""Signatures, and attacks on bundles: none is accepted."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from overcrank.engines.envelope import INDEX, OLD_BUNDLE, STATEMENT, signing_bytes, statement
from overcrank.engines.manifest import PULLED, SIGNATURE, check_files, file_entry, read_manifest
from overcrank.engines.refusals import CannotServe
from overcrank.engines.store import Store
from overcrank.engines.trust import LOW_ORDER, Keyring, fingerprint
from overcrank.errors import IntegrityError, StoreError, UserError
from overcrank.models import components, resolve
from overcrank.runtime.sessions.select import engine_of, fitting_bundles

FLIPS = 200


@pytest.fixture(autouse=True)
def ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keyring:
    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "config"))
    return Keyring()


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path, ring: Keyring) -> Path:
    """From elsewhere, and signed by a publisher who is trusted."""
    copied = tmp_path / demo_bundle.name
    shutil.copytree(demo_bundle, copied)
    (copied / PULLED).write_text("{}")
    ring.new("studio")
    ring.sign(copied, "studio")
    return copied


def accepted(bundle: Path) -> bool:
    """Whether a render would hand the bundle's engine to TensorRT."""
    try:
        demo = resolve("ltx-demo")
        fitting = fitting_bundles([bundle], demo, "sm_89", "bf16")
        return engine_of(components(demo, ("denoiser",))[0], fitting).folder == bundle
    except CannotServe:
        return False


def resigned(bundle: Path) -> None:
    """As an attacker who has a key of their own would sign it."""
    Keyring(bundle.parent / "attacker").sign(bundle, "studio")


def test_a_signed_bundle_is_used_until_its_key_is_revoked(bundle: Path, ring: Keyring) -> None:
    assert accepted(bundle)
    who = ring.check(bundle)
    assert who is not None
    assert who.name == "studio"
    ring.revoke("studio")
    assert not accepted(bundle)
    with pytest.raises(IntegrityError, match="is signed by 'studio', whose key was revoked 20"):
        ring.check(bundle)


def test_what_is_built_here_needs_no_signature_and_what_comes_from_elsewhere_does(bundle: Path, ring: Keyring) -> None:
    (bundle / SIGNATURE).unlink()
    assert not accepted(bundle)
    with pytest.raises(IntegrityError, match="came from elsewhere and is not signed"):
        ring.check(bundle)
    (bundle / PULLED).unlink()
    assert accepted(bundle)
    assert ring.check(bundle) is None


def test_a_flipped_bit_anywhere_is_refused(bundle: Path) -> None:
    """In every file that is read, at sampled places and at both ends."""
    chance, tried = random.Random(0), 0
    for name in ("denoiser.engine", "denoiser.onnx", "manifest.json", SIGNATURE):
        file = bundle / name
        whole = file.read_bytes()
        places = [0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(FLIPS // 4 - 2))]
        for place in places:
            changed = bytearray(whole)
            changed[place] ^= 1 << chance.randrange(8)
            file.write_bytes(changed)
            if accepted(bundle):  # space between what is signed may differ
                assert name == SIGNATURE
                assert json.loads(changed) == json.loads(whole)
            tried += 1
        file.write_bytes(whole)
    assert tried == FLIPS
    assert accepted(bundle)


def _truncated(bundle: Path) -> None:
    with (bundle / "denoiser.engine").open("r+b") as file:
        file.truncate(1000)


def _swapped(bundle: Path) -> None:
    shutil.copy(bundle / "denoiser.onnx", bundle / "denoiser.engine")


def _linked(bundle: Path) -> None:
    (bundle / "denoiser.engine").rename(bundle.parent / "elsewhere")
    (bundle / "denoiser.engine").symlink_to(bundle.parent / "elsewhere")


def _gone(bundle: Path) -> None:
    (bundle / "denoiser.engine").unlink()


def _unknown_key(bundle: Path) -> None:
    Keyring(bundle.parent / "attacker").new("studio")
    resigned(bundle)


def _known_name_unknown_key(bundle: Path) -> None:
    """The attacker's signature under the fingerprint that is trusted."""
    own = json.loads((bundle / SIGNATURE).read_text())
    _unknown_key(bundle)
    theirs = json.loads((bundle / SIGNATURE).read_text())
    theirs["signatures"][0]["keyid"] = own["signatures"][0]["keyid"]
    (bundle / SIGNATURE).write_text(json.dumps(theirs))


def _changed_manifest(bundle: Path) -> None:
    """An engine of the attacker's, with its hash put into the manifest."""
    (bundle / "denoiser.engine").write_bytes(b"code of mine")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["components"][0]["engine"] |= file_entry(bundle / "denoiser.engine").model_dump()
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def _rewritten(**fields: Any) -> Callable[[Path], None]:
    """A manifest changed and signed by the trusted publisher, whose own tools were deceived."""

    def change(bundle: Path) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text())
        for name, value in fields.items():
            if name == "file":
                manifest["components"][0]["engine"]["name"] = value
            else:
                manifest[name] = value
        content = json.dumps(manifest).encode()
        (bundle / "manifest.json").write_bytes(content)
        (bundle / SIGNATURE).write_bytes(Keyring().seal(STATEMENT, statement(content, ()), "studio")[0])

    return change


def _outside(name: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        shutil.copy(bundle / "denoiser.engine", bundle.parent / "outside.engine")
        _rewritten(file=name.replace("BUNDLE", str(bundle.parent)))(bundle)

    return change


def _huge_manifest(bundle: Path) -> None:
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(100_000_000)


def _huge_engine(bundle: Path) -> None:
    with (bundle / "denoiser.engine").open("r+b") as file:
        file.truncate(2**40)  # a sparse file: reading it would take an hour


def _deep(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("[" * 200_000)


def _linked_file(name: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        (bundle / name).rename(bundle.parent / "elsewhere")
        (bundle / name).symlink_to(bundle.parent / "elsewhere")

    return change


def _pipe(bundle: Path) -> None:
    """Reading it would wait for ever."""
    (bundle / SIGNATURE).unlink()
    os.mkfifo(bundle / SIGNATURE)


def _field(name: str, value: Any) -> Callable[[Path], None]:
    """A field of the first component, signed by the publisher, whose own tools were deceived."""

    def change(bundle: Path) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text())
        place: Any = manifest["components"][0]
        *names, last = name.split(".")
        for part in names:
            place = place[part]
        place[last] = value
        content = json.dumps(manifest).encode()
        (bundle / "manifest.json").write_bytes(content)
        (bundle / SIGNATURE).write_bytes(Keyring().seal(STATEMENT, statement(content, ()), "studio")[0])

    return change


def _plan(**fields: Any) -> Callable[[Path], None]:
    groups = ("gemm_formats", "weight_formats", "attention_formats", "weights_moved")
    numbers = ("kernels", "gemms", "fused_gemms", "convolutions", "attentions")
    return _field("plan", dict.fromkeys(numbers, 1) | {key: {} for key in groups} | fields)


def _other_statement(bundle: Path) -> None:
    """What the publisher signed of another manifest."""
    (bundle / SIGNATURE).write_bytes(Keyring().seal(STATEMENT, statement(b"{}", ()), "studio")[0])


def _no_statement(bundle: Path) -> None:
    (bundle / SIGNATURE).write_bytes(Keyring().seal(STATEMENT, b'{"_type": "x"}', "studio")[0])


def _index_as_statement(bundle: Path) -> None:
    (bundle / SIGNATURE).write_bytes(Keyring().seal(INDEX, b"{}", "studio")[0])


NAMED = r"components\.0\.engine\.name: String should match pattern"
ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "engine truncated": (_truncated, r"denoiser\.engine does not match the manifest \(size differs\)"),
    "engine swapped for another file": (_swapped, r"denoiser\.engine does not match the manifest"),
    "engine a link": (_linked, r"denoiser\.engine is a link, which is not allowed"),
    "manifest a link": (_linked_file("manifest.json"), r"manifest\.json is a link or no file"),
    "signature a link": (_linked_file(SIGNATURE), r"manifest\.sig is a link or no file"),
    "signature a pipe": (_pipe, r"manifest\.sig is a link or no file"),
    "engine gone": (_gone, r"denoiser\.engine is missing"),
    "signed by an unknown key": (_unknown_key, r"signed by the key [0-9a-f]{16}, which is not trusted here"),
    "signed by an unknown key under a trusted fingerprint": (
        _known_name_unknown_key,
        r"the signature of 'studio' is not of this content",
    ),
    "signature of another manifest": (_other_statement, r"its signature is of another manifest\.json"),
    "signature of no statement": (_no_statement, r"what is signed is no statement of a bundle: _type"),
    "signature of an index": (_index_as_statement, r"has payloadType 'application/vnd\.overcrank\.index"),
    "manifest and engine changed together": (_changed_manifest, r"its signature is of another manifest\.json"),
    "older schema": (_rewritten(schema_version=0), r"in another format of bundles \(0; this version reads 2\)"),
    "unknown field": (_rewritten(command="rm"), r"manifest\.json: command: Extra inputs are not permitted"),
    "name with ..": (_outside("../outside.engine"), NAMED),
    "absolute name": (_outside("BUNDLE/outside.engine"), NAMED),
    "name with a backslash": (_outside("..\\outside.engine"), NAMED),
    "hidden name": (_outside(".engine"), NAMED),
    "empty name": (_outside(""), NAMED),
    "name of 300 letters": (_outside("x" * 300), NAMED),
    "name of the signature": (_rewritten(file=SIGNATURE), r"a file is named twice, or by a name that is another"),
    "manifest of 100 MB": (_huge_manifest, r"manifest\.json has 100,000,000 bytes, which no bundle's has"),
    "engine of a terabyte": (_huge_engine, r"denoiser\.engine does not match the manifest \(size differs\)"),
    "manifest nested without end": (_deep, r"manifest\.json: the file: Invalid JSON"),
    "a size of 401 digits": (_field("engine.bytes", 10**400), r"components\.0\.engine\.bytes: "),
    "a time without end": (_rewritten(build_seconds=1e999), r"build_seconds: "),
    "a schema without end": (_rewritten(schema_version=1e999), r"schema_version: "),
    "a dimension below zero": (_field("inputs", [{"name": "x", "dtype": "bf16", "dims": [-1]}]), r"inputs\.0\.dims\.0"),
    "a configuration nested deeply": (_field("config", {"x": json.loads("[" * 40 + "]" * 40)}), "nested too deeply"),
    "a configuration with a huge number": (_field("config", {"x": 10**400}), r"config: .*a number is out of bounds"),
    "a count of 401 digits": (_plan(kernels=10**400), r"components\.0\.plan: .*a number is out of bounds"),
    "a count below zero": (_plan(gemm_formats={"fp8": -1}), r"components\.0\.plan: .*a count is below zero"),
    "an escape in a format": (_plan(gemm_formats={"\x1b[2J": 1}), r"components\.0\.plan: .*control characters"),
    "an escape in a label": (_rewritten(model="x\x1b]52;c;eA==\x07"), r"model: .*control characters"),
    "a line break in a label": (_rewritten(hub_id="x\nsigned by studio"), r"hub_id: .*control characters"),
    "a label of 300 letters": (_rewritten(hub_id="x" * 300), r"hub_id: String should have at most 255"),
    "an unknown family": (_rewritten(family="demo.train"), r"family: this version of overcrank knows none"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attack_is_accepted(attack: str, bundle: Path, ring: Keyring) -> None:
    assert accepted(bundle)
    change, says = ATTACKS[attack]
    change(bundle)
    with pytest.raises(IntegrityError, match=says):
        ring.whole(bundle)
    assert not accepted(bundle)


def test_an_engine_of_another_bundle_is_refused_though_both_are_signed(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    (other / "denoiser.engine").write_bytes(b"another whole engine")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["components"][0]["engine"] |= file_entry(other / "denoiser.engine").model_dump()
    (other / "manifest.json").write_text(json.dumps(manifest))
    Keyring().sign(other, "studio")
    assert check_files(other, read_manifest(other)) == []
    shutil.copy(other / "denoiser.engine", bundle / "denoiser.engine")
    assert not accepted(bundle)
    shutil.copy(other / SIGNATURE, bundle / SIGNATURE)
    assert not accepted(bundle)


def test_commands(run: Any, tmp_path: Path, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run("overcrank", "keys", "new", "studio")
    assert made.exit_code == 0, made.output
    line = made.stdout.strip().splitlines()[-1]
    assert line.startswith("overcrank-ed25519 ")
    private = tmp_path / "config" / "studio.key"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    bundle = tmp_path / demo_bundle.name
    shutil.copytree(demo_bundle, bundle)
    assert "signed ltx-demo" in run("overcrank", "engines", "sign", bundle, "--key", "studio").output
    assert "by studio, " in run("overcrank", "engines", "show", bundle).output
    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "customer"))
    assert "NOT VALID" in run("overcrank", "engines", "show", bundle).output
    assert "no keys; bundles built here need none" in run("overcrank", "keys", "list").output
    (tmp_path / "studio.pub").write_text(line + "\n")
    assert "trusted studio" in run("overcrank", "keys", "trust", tmp_path / "studio.pub").output
    assert "by studio, " in run("overcrank", "engines", "show", bundle).output
    assert "studio: trusted since 20" in run("overcrank", "keys", "list").output
    assert run("overcrank", "keys", "revoke", fingerprint(line.split()[1])[:12]).exit_code == 0
    assert "studio: revoked 20" in run("overcrank", "keys", "list").output
    assert "NOT VALID" in run("overcrank", "engines", "show", bundle).output
    (bundle / "denoiser.engine").write_bytes(b"damaged")
    refused = run("overcrank", "engines", "sign", bundle, "--key", "studio")
    assert refused.exit_code == 1
    assert "is not signed: denoiser.engine does not match" in refused.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["new", "../key"], "is no name for a key"),
        (["trust", "overcrank-ed25519", "AAAA", "name"], "is no public key; it looks like"),
        (["trust", "hello"], "is no public key; it looks like"),
        (["revoke", "nobody"], "no trusted key matches 'nobody'"),
        (["revoke", ""], "no trusted key matches ''"),
    ],
)
def test_wrong_words(words: list[str], says: str, run: Any) -> None:
    result = run("overcrank", "keys", *words)
    assert result.exit_code == 2
    assert says in result.output


def test_a_key_is_not_overwritten_and_a_lost_list_is_not_empty(ring: Keyring, bundle: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        ring.new("studio")
    with pytest.raises(UserError, match="there is no key"):
        ring.sign(bundle, "nobody")
    (ring.folder / "trusted.json").write_text("{")
    with pytest.raises(UserError, match=r"trusted.json cannot be read as a list of trusted keys"):
        ring.check(bundle)


P = 2**255 - 19
SMALL = (0, 1, P - 1, *(y for y in (LOW_ORDER[2], P - LOW_ORDER[2])))
WEAK = [(y | sign).to_bytes(32, "little") for y in (*SMALL, P, P + 1) for sign in (0, 1 << 255)]


def test_the_heights_of_low_order_points_are_theirs() -> None:
    """Eight times such a point is the neutral one, by the addition law of ed25519."""
    d = -121665 * pow(121666, -1, P) % P

    def plus(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
        k = d * a[0] * b[0] * a[1] * b[1] % P
        x = (a[0] * b[1] + a[1] * b[0]) * pow(1 + k, -1, P) % P
        return x, (a[1] * b[1] + a[0] * b[0]) * pow(1 - k, -1, P) % P

    for y in SMALL:
        square = (y * y - 1) * pow(d * y * y + 1, -1, P) % P
        x = pow(square, (P + 3) // 8, P)
        x = x if x * x % P == square else x * pow(2, (P - 1) // 4, P) % P
        assert x * x % P == square
        point = (x, y)
        for _ in range(3):
            point = plus(point, point)
        assert point == (0, 1)


@pytest.mark.parametrize("raw", WEAK, ids=lambda raw: raw.hex()[:8] + raw.hex()[-2:])
def test_a_key_of_low_order_is_refused(raw: bytes, ring: Keyring) -> None:
    with pytest.raises(UserError, match="the key of 'studio' is of low order"):
        ring.trust(f"overcrank-ed25519 {base64.b64encode(raw).decode()} studio")
    assert ring.publishers() == {}


def test_what_anybody_can_sign_for_a_key_of_low_order_is_refused_though_it_is_listed(
    bundle: Path, ring: Keyring
) -> None:
    """The library takes R = neutral, S = 0 under the neutral key for a signature of anything."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    weak, forged = (1).to_bytes(32, "little"), (1).to_bytes(32, "little") + bytes(32)
    Ed25519PublicKey.from_public_bytes(weak).verify(forged, b"anything")
    public = base64.b64encode(weak).decode()
    entry = {"name": "weak", "public": public, "added": "2026"}
    (ring.folder / "trusted.json").write_text(json.dumps({fingerprint(public): entry}))
    envelope = json.loads((bundle / SIGNATURE).read_text())
    envelope["signatures"] = [{"keyid": fingerprint(public), "sig": base64.b64encode(forged).decode()}]
    (bundle / SIGNATURE).write_text(json.dumps(envelope))
    with pytest.raises(IntegrityError, match="the signature of 'weak' is not of this content"):
        ring.check(bundle)


def test_a_revoked_key_is_not_trusted_again(bundle: Path, ring: Keyring) -> None:
    line = next(iter(ring.publishers().values())).line()
    ring.revoke("studio")
    for name in ("studio", "another"):
        with pytest.raises(UserError, match=r"of 'studio' was revoked here 20.*and is not trusted again"):
            ring.trust(line.rpartition(" ")[0] + f" {name}")
    assert not accepted(bundle)


def test_two_keys_have_two_names(ring: Keyring, tmp_path: Path) -> None:
    own = ring.new("studio")
    other = Keyring(tmp_path / "other").new("studio")
    for name in ("studio", "Studio"):
        with pytest.raises(
            UserError, match=r"'studio' is the name of another key that is trusted here \([0-9a-f]{16}\)"
        ):
            ring.trust(f"overcrank-ed25519 {other.public} {name}")
    with pytest.raises(UserError, match="is the name of another key"):
        ring.new("STUDIO")
    assert not (ring.folder / "STUDIO.key").exists()
    assert ring.trust(f"overcrank-ed25519 {other.public} studio-2").name == "studio-2"
    assert ring.trust(own.line()) == own, "twice is once"
    ring.revoke("studio-2")
    third = Keyring(tmp_path / "third").new("studio-2")
    assert ring.trust(third.line()).name == "studio-2", "the name of a revoked key is free"


def test_modes_do_not_depend_on_the_umask(ring: Keyring) -> None:
    before = os.umask(0)
    try:
        ring.new("studio")
        ring.require_newer("https://somewhere", 3, remember=True)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in ring.folder.iterdir() if p.name != ".lock"}
    assert modes == {"studio.key": 0o600, "trusted.json": 0o600, "seen.json": 0o600}
    assert stat.S_IMODE(ring.folder.stat().st_mode) == 0o700


@pytest.fixture
def somebody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of a user without rights, as whom the test goes on."""
    if os.geteuid():
        pytest.skip("becoming another user needs root")
    folder = Path(tempfile.mkdtemp(prefix="overcrank-", dir="/tmp"))
    folder.chmod(0o777)
    Keyring(folder / "warm up").new("x")  # what is imported later may not be readable
    yield folder
    os.seteuid(0)
    shutil.rmtree(folder)


def test_a_configuration_of_another_user(somebody: Path) -> None:
    Keyring(somebody / "theirs").new("studio")
    (somebody / "open").mkdir()
    (somebody / "open").chmod(0o755)
    shutil.copy(somebody / "theirs" / "trusted.json", somebody / "open" / "trusted.json")
    (somebody / "open" / "trusted.json").chmod(0o666)
    os.seteuid(65534)
    with pytest.raises(UserError, match=r"trusted\.json cannot be read \(Permission denied\); set \$OVERCRANK_CONFIG"):
        Keyring(somebody / "theirs").publishers()
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\); give a writable \$OVERCRANK_CONFIG"):
        Keyring(somebody / "theirs").new("mine")
    with pytest.raises(UserError, match="may be written by others; make it yours alone"):
        Keyring(somebody / "open").publishers()


def test_a_store_of_another_user(somebody: Path, demo_store: Path) -> None:
    store = Store(shutil.copytree(demo_store, somebody / "store"))
    (name,) = (path.name for path, _ in store.list())
    (store.bundles / name).chmod(0o700)
    os.seteuid(65534)
    ((_, unreadable),) = store.list()
    assert isinstance(unreadable, IntegrityError)
    assert "cannot be read (Permission denied)" in str(unreadable)
    os.seteuid(0)
    store.bundles.chmod(0o700)
    os.seteuid(65534)
    with pytest.raises(StoreError, match=r"bundles cannot be read \(Permission denied\); give another store"):
        store.list()


def test_signatures_of_older_versions_are_read(bundle: Path, ring: Keyring) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key: Any = load_pem_private_key((ring.folder / "studio.key").read_bytes(), None)
    signature = base64.b64encode(key.sign(OLD_BUNDLE + (bundle / "manifest.json").read_bytes())).decode()
    (who,) = ring.publishers()
    old = {"schema_version": 1, "key": who, "name": "studio", "signature": signature}
    (bundle / SIGNATURE).write_text(json.dumps(old))
    assert accepted(bundle)
    (bundle / "manifest.json").write_text((bundle / "manifest.json").read_text() + " ")
    with pytest.raises(IntegrityError, match="the signature of 'studio' is not of this content"):
        ring.check(bundle)


def test_openssl_verifies_the_envelope_and_the_statement_names_every_file(
    bundle: Path, ring: Keyring, tmp_path: Path
) -> None:
    """By the specification alone: what is signed, under which key, and SHA-256 of the bundle's files."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl here")
    envelope = json.loads((bundle / SIGNATURE).read_text())
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    message = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
    (publisher,) = ring.publishers().values()
    public = bytes.fromhex("302a300506032b6570032100") + base64.b64decode(publisher.public)  # RFC 8410
    for name, content in (
        ("message", message),
        ("sig", base64.b64decode(envelope["signatures"][0]["sig"])),
        ("key", public),
    ):
        (tmp_path / name).write_bytes(content)
    words = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-keyform", "DER"]
    words += ["-inkey", "key", "-in", "message", "-sigfile", "sig"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Signature Verified Successfully" in done.stdout, done.stderr
    about = json.loads(payload)
    assert (about["_type"], about["predicateType"]) == ("https://in-toto.io/Statement/v1", "urn:overcrank:bundle:1")
    named = {s["name"]: s["digest"]["sha256"] for s in about["subject"]}
    assert named == {n: file_entry(bundle / n).sha256 for n in ("manifest.json", "denoiser.engine", "denoiser.onnx")}
    assert signing_bytes(envelope["payloadType"], payload) == message


def test_nothing_that_others_wrote_reaches_the_terminal_raw(run: Any, demo_store: Path, tmp_path: Path) -> None:
    """Fields with escapes are refused; markup is no markup; a damaged bundle is a line, and never the end."""
    store = shutil.copytree(demo_store, tmp_path / "store")
    (whole,) = (store / "bundles").iterdir()
    text = json.loads((whole / "manifest.json").read_text())
    bad = {
        "markup": text | {"flavour_version": "[/]"},
        "escape": text | {"precision": "\x1b]52;c;eA==\x07"},
        "line": text | {"target": "sm_89\nsigned   by studio"},
        "none": [],
    }
    for name, content in bad.items():
        shutil.copytree(whole, store / "bundles" / name)
        (store / "bundles" / name / "manifest.json").write_text(json.dumps(content))
    (store / "bundles" / "a\x1b[31mname").mkdir()
    (store / "bundles" / "a\x1b[31mname" / "manifest.json").write_text("{")
    listed = run("overcrank", "engines", "list", "--store", store)
    assert listed.exit_code == 0, listed.output
    assert "[/]" in listed.output
    for command in (["list"], ["fsck"], ["show", "markup"], ["show", "escape"], ["show", "line"], ["gc", "--dry-run"]):
        result = run("overcrank", "engines", *command, "--store", store)
        assert isinstance(result.exception, SystemExit | None), command
        assert "\x1b" not in result.output, command
        assert "\x07" not in result.output, command
        assert "\nsigned   by studio" not in result.output, command
        assert "Traceback" not in result.output
    assert whole.name in listed.output
