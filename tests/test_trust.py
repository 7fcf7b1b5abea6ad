"""Signatures, and attacks on bundles: none is accepted."""

from __future__ import annotations

import json
import random
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from overcrank.engines.manifest import check_files, file_entry, read_manifest
from overcrank.engines.refusals import CannotServe
from overcrank.engines.trust import PULLED, SIGNATURE, Keyring, fingerprint
from overcrank.errors import IntegrityError, UserError
from overcrank.models import components, resolve
from overcrank.runtime.sessions.select import engine_of, fitting_bundles

FLIPS = 200
OTHER_CONTENT = "the signature of 'studio' is not of this content"
SIZE, PATH = r"denoiser\.engine does not match the manifest \(size", "a file name with a path is not allowed"
FLIPPED = {
    "denoiser.engine": r"denoiser\.engine does not match the manifest \(SHA-256",
    "denoiser.onnx": r"denoiser\.onnx does not match the manifest \(SHA-256",
    # what cannot be read, is of another schema or names another file is said before who signed it
    "manifest.json": rf"{OTHER_CONTENT}|manifest\.json: .*rebuild|in another format|is missing|does not match the"
    rf"|{PATH}|there is no engine of ltx-demo|the engines of ltx-demo (are|for)|no bundle has an engine of denoiser",
    SIGNATURE: rf"{OTHER_CONTENT}|is no signature|is signed by '.*' \(.*\), who is not trusted here",
}
"""In which words a flipped bit is refused."""


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


def refusal(bundle: Path) -> str:
    """Why no render would hand the bundle's engine to TensorRT; empty if one would.

    Of a manifest that cannot be read a render knows nothing: then it is why it cannot.
    """
    demo = resolve("ltx-demo")
    try:
        fitting = fitting_bundles([bundle], demo, "sm_89", "bf16")
        assert engine_of(components(demo, ("denoiser",))[0], fitting).folder == bundle
    except CannotServe as error:
        try:
            read_manifest(bundle)
        except IntegrityError as unread:
            return str(unread)
        return error.why.reason
    return ""


def resigned(bundle: Path) -> None:
    """As an attacker who has a key of their own would sign it."""
    Keyring(bundle.parent / "attacker").sign(bundle, "studio")


def test_a_signed_bundle_is_used_until_its_key_is_revoked(bundle: Path, ring: Keyring) -> None:
    assert not refusal(bundle)
    who = ring.check(bundle)
    assert who is not None
    assert who.name == "studio"
    ring.revoke("studio")
    assert "whose key was revoked" in refusal(bundle)
    with pytest.raises(IntegrityError, match="is signed by 'studio', whose key was revoked 20"):
        ring.check(bundle)


def test_what_is_built_here_needs_no_signature_and_what_comes_from_elsewhere_does(bundle: Path, ring: Keyring) -> None:
    (bundle / SIGNATURE).unlink()
    assert "came from elsewhere and is not signed" in refusal(bundle)
    with pytest.raises(IntegrityError, match="came from elsewhere and is not signed"):
        ring.check(bundle)
    (bundle / PULLED).unlink()
    assert not refusal(bundle)
    assert ring.check(bundle) is None


def test_a_flipped_bit_anywhere_is_refused(bundle: Path) -> None:
    """In every file that is read, at sampled places and at both ends."""
    chance, tried = random.Random(0), 0
    for name, reasons in FLIPPED.items():
        file = bundle / name
        whole = file.read_bytes()
        places = [0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(FLIPS // 4 - 2))]
        for place in places:
            changed = bytearray(whole)
            changed[place] ^= 1 << chance.randrange(8)
            file.write_bytes(changed)
            why = refusal(bundle)
            if not why:  # a label in the signature's file may differ: what it signs does not
                assert name == SIGNATURE
                assert json.loads(changed)["signature"] == json.loads(whole)["signature"]
            assert not why or re.search(reasons, why), (name, place)
            tried += 1
        file.write_bytes(whole)
    assert tried == FLIPS
    assert not refusal(bundle)


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
    (bundle / SIGNATURE).write_text(json.dumps(theirs | {"key": own["key"]}))


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
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        Keyring().sign(bundle, "studio")

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


ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "engine truncated": (_truncated, SIZE),
    "engine swapped for another file": (_swapped, SIZE),
    "engine a link": (_linked, r"denoiser\.engine is a link"),
    "engine gone": (_gone, r"denoiser\.engine is missing"),
    "signed by an unknown key": (_unknown_key, r"is signed by 'studio' \([0-9a-f]+\), who is not trusted here"),
    "signed by an unknown key under a trusted fingerprint": (_known_name_unknown_key, OTHER_CONTENT),
    "manifest and engine changed together": (_changed_manifest, OTHER_CONTENT),
    "older schema": (_rewritten(schema_version=0), r"in another format of bundles \(0;"),
    "unknown field": (_rewritten(command="rm"), r"manifest\.json: command: Extra inputs"),
    "name with ..": (_outside("../outside.engine"), PATH),
    "absolute name": (_outside("BUNDLE/outside.engine"), PATH),
    "name with a backslash": (_outside("..\\outside.engine"), PATH),
    "hidden name": (_outside(".engine"), PATH),
    "empty name": (_outside(""), "^bundle .* is damaged:  is missing"),
    "manifest of 100 MB": (_huge_manifest, r"manifest\.json has 100,000,000 bytes, which no bundle's has"),
    "engine of a terabyte": (_huge_engine, SIZE),
    "manifest nested without end": (_deep, r"manifest\.json: the file: .*recursion limit"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_for_what_it_is(attack: str, bundle: Path) -> None:
    assert not refusal(bundle)
    change, reason = ATTACKS[attack]
    change(bundle)
    assert re.search(reason, refusal(bundle))


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
    assert re.search(SIZE, refusal(bundle))
    shutil.copy(other / SIGNATURE, bundle / SIGNATURE)
    assert re.search(SIZE, refusal(bundle))
    shutil.copy(other / "manifest.json", bundle / "manifest.json")
    assert not refusal(bundle), "with its manifest it is the other bundle, whole"


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
@pytest.mark.quick
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
