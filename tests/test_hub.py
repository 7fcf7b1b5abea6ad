"""Checkpoints from a hub on 127.0.0.1, through the hub's real client in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from overcrank.models import resolve

from tests import hub_server

FETCH = """
import sys
from pathlib import Path
from overcrank.errors import OvercrankError
from overcrank.models import hub_folder, resolve
from overcrank.cli.display import downloading
from functools import partial
try:
    watch = partial(downloading, quiet=False)
    given = sys.argv[3].split()
    print(hub_folder(resolve(sys.argv[1]), whole=True, home=Path(sys.argv[2]), watch=watch, elsewhere=given))
except OvercrankError as error:
    sys.exit(f"error: {error}")
"""
WAN = {
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "image_encoder": [None, None],
}
BIG = 3_000_000


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[hub_server.Hub]:
    (tmp_path / "root").mkdir()
    with hub_server.serve(tmp_path / "root") as made:
        yield made


def write(folder: Path, files: dict[str, int | dict[str, Any]]) -> None:
    """Files of so many random bytes, or with this JSON."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            (folder / name).write_bytes(os.urandom(content))
        else:
            (folder / name).write_text(json.dumps(content))


def wan(root: Path, name: str = "Wan-AI/Wan2.2-T2V-A14B-Diffusers") -> set[str]:
    """A repository in the published layout, with what nobody needs beside it; returns what is needed."""
    weights = "diffusion_pytorch_model"
    needed: dict[str, int | dict[str, Any]] = {
        "model_index.json": {"_class_name": "WanPipeline", **WAN},
        "transformer/config.json": {"of": "transformer"},
        f"transformer/{weights}.safetensors.index.json": {
            "weight_map": {n: f"{weights}-0000{n}-of-00002.safetensors" for n in "12"}
        },
        f"transformer/{weights}-00001-of-00002.safetensors": BIG,
        f"transformer/{weights}-00002-of-00002.safetensors": 9000,
        "transformer_2/config.json": {"of": "transformer_2"},
        f"transformer_2/{weights}.safetensors": 9000,
        "text_encoder/config.json": {"of": "text_encoder"},
        "text_encoder/model.safetensors": 9000,
        "tokenizer/tokenizer_config.json": {"of": "tokenizer"},
        "tokenizer/spiece.model": 5000,
        "vae/config.json": {"of": "vae"},
        f"vae/{weights}.safetensors": 9000,
        "scheduler/scheduler_config.json": {"of": "scheduler"},
    }
    others = [
        f"transformer/{weights}.fp16.safetensors", f"transformer/{weights}.bin", f"vae/{weights}.fp16.safetensors",
        f"transformer/{weights}-00003-of-00003.safetensors", "text_encoder/pytorch_model.bin", "vae/flax_model.msgpack",
        "vae/model.onnx", "vae/model.onnx_data", "wan2.2_all.safetensors", "README.md", "assets/picture.png",
        "image_encoder/model.safetensors", "transformer/original/model.safetensors", "google/umt5/spiece.model",
    ]  # fmt: skip
    write(root / name, needed | dict.fromkeys(others, 5000))
    return {f"{name}/{n}" for n in needed}


def command(
    hub: hub_server.Hub, tmp_path: Path, model: str, given: str = "", **environment: str
) -> tuple[list[str], dict[str, str]]:
    own = os.environ | hub.environment(tmp_path / "hf") | environment
    return [sys.executable, "-c", FETCH, model, str(tmp_path / "home"), given], own


def fetch(
    hub: hub_server.Hub, tmp_path: Path, model: str, given: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`given`: parts whose weights come from elsewhere."""
    words, own = command(hub, tmp_path, model, given, **environment)
    return subprocess.run(words, env=own, capture_output=True, text=True, check=False, timeout=120)


def refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    assert done.returncode == 1, done.stdout
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert done.stderr.rstrip().endswith(line), "one sentence, and nothing after it"
    for words in said:
        assert words in line


def test_first_download_fetches_what_a_render_needs_and_no_more(hub: hub_server.Hub, tmp_path: Path) -> None:
    needed = wan(hub.root)
    done = fetch(hub, tmp_path, "wan-2.2-t2v-a14b")
    assert done.returncode == 0, done.stderr
    assert hub.fetched() == needed
    told = "wan-2.2-t2v-a14b: 3.0 MB in 12 files from 'Wan-AI/Wan2.2-T2V-A14B-Diffusers'"
    assert told in done.stderr
    folder = Path(done.stdout.strip())
    name = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    served = hub.root / "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    assert (folder / name).read_bytes() == (served / name).read_bytes()
    hub.asked.clear()
    again = fetch(hub, tmp_path, "wan-2.2-t2v-a14b")
    assert again.stdout == done.stdout
    assert not [a for a in hub.asked if "Wan" in a], "a whole cache needs no network"
    hub.down = True
    offline = fetch(hub, tmp_path, "wan-2.2-t2v-a14b", HF_HUB_OFFLINE="1")
    assert offline.stdout == done.stdout
    (folder / name).unlink()
    refused(fetch(hub, tmp_path, "wan-2.2-t2v-a14b", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", str(tmp_path))


def test_weights_that_come_from_elsewhere_are_not_fetched(hub: hub_server.Hub, tmp_path: Path) -> None:
    needed = wan(hub.root)
    given = "transformer transformer_2 text_encoder"
    done = fetch(hub, tmp_path, "wan-2.2-t2v-a14b", given)
    assert done.returncode == 0, done.stderr
    weights = {file for file in needed if file.split("/")[2] in given.split() and not file.endswith("config.json")}
    assert hub.fetched() == needed - weights
    offline = fetch(hub, tmp_path, "wan-2.2-t2v-a14b", given, HF_HUB_OFFLINE="1")
    assert offline.stdout == done.stdout, "what was fetched is whole for the same files"
    refused(fetch(hub, tmp_path, "wan-2.2-t2v-a14b", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set")
    hub.sent.clear()
    assert fetch(hub, tmp_path, "wan-2.2-t2v-a14b").returncode == 0
    assert hub.fetched() == weights, "without them the rest is fetched"


def test_a_line_that_breaks_is_taken_up_where_it_was(hub: hub_server.Hub, tmp_path: Path) -> None:
    wan(hub.root)
    name = "Wan-AI/Wan2.2-T2V-A14B-Diffusers/transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    hub.cut[name] = 2_000_000
    done = fetch(hub, tmp_path, "wan-2.2-t2v-a14b")
    assert done.returncode == 0, done.stderr
    assert [a for a in hub.asked if a.startswith(f"GET /blob/{name} bytes=")]
    assert hub.sent[name] < 1.5 * BIG
    got = Path(done.stdout.strip()) / name.partition("Diffusers/")[2]
    assert got.read_bytes() == (hub.root / name).read_bytes()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_goes_on_from_there(hub: hub_server.Hub, tmp_path: Path, how: signal.Signals) -> None:
    wan(hub.root)
    name = "Wan-AI/Wan2.2-T2V-A14B-Diffusers/transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    hub.stall.add(name)
    words, own = command(hub, tmp_path, "wan-2.2-t2v-a14b")
    process = subprocess.Popen(words, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert hub.stalled.wait(60)
    (part,) = _partial(tmp_path)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert "was cancelled; the same command goes on from there." in said
    there = part.stat().st_size
    assert 0 < there < BIG
    hub.stall.clear()
    hub.sent.clear()
    done = fetch(hub, tmp_path, "wan-2.2-t2v-a14b")
    assert done.returncode == 0, done.stderr
    assert "of it are here already" in done.stderr
    assert f"GET /blob/{name} bytes={there}-" in hub.asked
    assert hub.sent[name] == BIG - there
    got = Path(done.stdout.strip()) / name.partition("Diffusers/")[2]
    assert got.read_bytes() == (hub.root / name).read_bytes()
    assert not list((tmp_path / "hf").rglob("*.incomplete"))


def _partial(tmp_path: Path) -> list[Path]:
    import time

    for _ in range(100):
        found = [f for f in (tmp_path / "hf").rglob("*.overcrank.incomplete") if f.stat().st_size > BIG // 4]
        if found:
            return found
        time.sleep(0.05)
    return []


def test_bytes_that_were_put_together_wrongly_are_not_kept(hub: hub_server.Hub, tmp_path: Path) -> None:
    wan(hub.root)
    name = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    served = hub.root / "Wan-AI/Wan2.2-T2V-A14B-Diffusers" / name
    blobs = tmp_path / "hf/hub/models--Wan-AI--Wan2.2-T2V-A14B-Diffusers/blobs"
    write(blobs, {f"{hub_server.tag_of(served)}.overcrank.incomplete": 1000})
    refused(fetch(hub, tmp_path, "wan-2.2-t2v-a14b"), name, "did not arrive as it was sent")
    assert fetch(hub, tmp_path, "wan-2.2-t2v-a14b").returncode == 0


def test_what_is_wrong_is_said_in_a_sentence(hub: hub_server.Hub, tmp_path: Path) -> None:
    wan(hub.root)
    served = hub.root / "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    shutil.rmtree(served / "transformer_2")
    refused(fetch(hub, tmp_path, "wan-2.2-t2v-a14b"), "lacks the part 'transformer_2'")
    write(served, {"transformer_2/config.json": {}})
    refused(fetch(hub, tmp_path, "wan-2.2-t2v-a14b"), "lacks the weights of 'transformer_2'")
    hub.gated.add("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    page = f"{hub.url}/Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    refused(fetch(hub, tmp_path / "b", "wan-2.2-t2v-a14b"), "is gated: accept its licence at", page, "`hf auth login`")
    refused(fetch(hub, tmp_path, "wan-2.2-i2v-a14b"), "There is no repository 'Wan-AI/Wan2.2-I2V-A14B-Diffusers'")
    refused(fetch(hub, tmp_path, "nobody/nothing"), "There is no repository 'nobody/nothing'", "needs no download")
    wan(hub.root, "nvidia/Cosmos-Predict2.5-2B")
    refused(fetch(hub, tmp_path, "cosmos-predict2.5-2b"), "has no revision 'diffusers/base/post-trained'")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    refused(fetch(hub, tmp_path, "wan-2.1-t2v-14b", **nowhere), "cannot be fetched from http://127.0.0.1:9")
    refused(fetch(hub, tmp_path, "wan-2.1-t2v-14b", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set")
    refused(fetch(hub, tmp_path, "ltx-2b-0.9.6-dev"), "is published as one file")


def test_a_login_opens_a_gated_repository(hub: hub_server.Hub, tmp_path: Path) -> None:
    wan(hub.root)
    hub.gated.add("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    assert fetch(hub, tmp_path, "wan-2.2-t2v-a14b", HF_TOKEN="hf_granted").returncode == 0


def test_a_token_that_cannot_be_used_is_said_to_be_it(hub: hub_server.Hub, tmp_path: Path) -> None:
    wan(hub.root)
    says = ("The Hugging Face token cannot be used", "set HF_TOKEN anew, or log in with `hf auth login`.")
    for token in ("hf_wrong", "hf_wröng"):
        refused(fetch(hub, tmp_path, "wan-2.2-t2v-a14b", HF_TOKEN=token), *says)
    (tmp_path / "folder").mkdir()
    refused(fetch(hub, tmp_path, "wan-2.2-t2v-a14b", HF_TOKEN_PATH=str(tmp_path / "folder")), *says)


def test_a_disk_that_is_too_small(hub: hub_server.Hub, tmp_path: Path) -> None:
    """Its size is told by a stand-in: a disk that is really full would be everybody's here."""
    wan(hub.root)
    words, own = command(hub, tmp_path, "wan-2.2-t2v-a14b")
    small = (
        "import shutil\nfrom types import SimpleNamespace\nshutil.disk_usage = lambda f: SimpleNamespace(free=10**6)\n"
    )
    words[2] = small + FETCH
    done = subprocess.run(words, env=own, capture_output=True, text=True, check=False, timeout=120)
    refused(done, "needs 3.0 MB more in", str(tmp_path / "hf"), "where 1.0 MB are free")
    assert not [a for a in hub.asked if "/blob/" in a]


def test_a_revision_and_an_older_address(hub: hub_server.Hub, tmp_path: Path) -> None:
    wan(hub.root, "nvidia/Cosmos-Predict2.5-2B@diffusers%2Fbase%2Fpost-trained")
    done = fetch(hub, tmp_path, "cosmos-predict2.5-2b")
    assert done.returncode == 0, done.stderr
    assert fetch(hub, tmp_path, "nvidia/cosmos-predict2.5-2b", HF_HUB_OFFLINE="1").stdout == done.stdout
    wan(hub.root, "zai-org/CogVideoX-5b")
    hub.moved["THUDM/CogVideoX-5b"] = "zai-org/CogVideoX-5b"
    first = fetch(hub, tmp_path, "THUDM/CogVideoX-5b")
    assert first.returncode == 0, first.stderr
    cache = tmp_path / "hf/hub"
    (cache / "models--zai-org--CogVideoX-5b").rename(cache / "models--THUDM--cogvideox-5b")
    older = fetch(hub, tmp_path, "cogvideox-5b", HF_HUB_OFFLINE="1")
    assert "models--THUDM--cogvideox-5b" in older.stdout, older.stderr


def test_ids_of_a_model() -> None:
    assert resolve("THUDM/CogVideoX-2b").name == resolve("zai-org/cogvideox-2B").name == "cogvideox-2b"
    assert resolve("Wan-AI/Wan2.1-VACE-14B-Diffusers").name == "wan-2.1-vace-14b"
    assert resolve("Wan-AI/Wan2.1-VACE-14B-diffusers").hub_id == "Wan-AI/Wan2.1-VACE-14B-diffusers"
    assert resolve("hunyuanvideo-community/HunyuanVideo").name == "hunyuan-video-13b"
    assert resolve("lllyasviel/FramePackI2V_HY").name == "framepack-i2v-13b"
    assert resolve("Lightricks/LTX-Video").name == "ltx-2b-0.9.0"
    assert resolve("diffusers/LTX-Video-0.9.1").name == "ltx-2b-0.9.1"


def test_what_a_download_is_can_be_asked_before(run: Any) -> None:
    shown = run("overcrank", "models", "show", "THUDM/CogVideoX-5b").output
    assert "zai-org/CogVideoX-5b" in shown
    shown = run("overcrank", "models", "show", "cosmos-predict2.5-2b").output
    assert "nvidia/Cosmos-Predict2.5-2B, revision diffusers/base/post-trained" in shown
    assert "licence" in shown
    assert "download" in shown


def test_a_download_in_python_shows_a_bar_and_its_end(capsys: Any) -> None:
    from overcrank.models.hub import progress_bar

    with progress_bar("two parts", 4_000_000) as advance:
        advance(1_000_000)
        advance(3_000_000)
    shown = capsys.readouterr().err
    assert "two parts" in shown
    assert "100%" in shown
    assert "4.00M/4.00M" in shown
