"""How files are named: parts, files that tell which model they are, and a ComfyUI models tree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from overcrank.errors import ModelError, UserError
from overcrank.export.files.comfy import comfy_tree
from overcrank.models import local_folder, resolve
from overcrank.runtime.options import LoadOptions
from overcrank.runtime.pipeline.naming import files_of, named_files, weights_of, with_paths

from tests import single_files as files
from tests.test_bad_input import refused
from tests.test_files import shapes_of

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ltx-demo in single files, under names that say nothing."""
    made = tmp_path_factory.mktemp("single files")
    plain = files.original(files.weights("transformer"))
    vae = files.weights("vae")
    files.saved(made / "a.safetensors", plain)
    files.saved(made / "b.safetensors", files.fp8(plain))
    files.saved(made / "c.safetensors", vae)
    files.saved(made / "d.safetensors", plain | {f"vae.{name}": tensor for name, tensor in vae.items()})
    files.saved(made / "e.safetensors", files.fp8(files.weights("text_encoder"), "scale_weight", told=False))
    files.lora(made / "l.safetensors")
    return made


@pytest.fixture
def tree(folder: Path, tmp_path: Path) -> Path:
    """A ComfyUI folder, and a disk of models beside it that its extra_model_paths.yaml names."""
    comfy, disk = tmp_path / "ComfyUI", tmp_path / "disk"
    for kind, file, name in (
        ("diffusion_models", "b", "ltx/demo_fp8_scaled"),
        ("unet", "a", "demo_fp16"),
        ("vae", "c", "demo_vae"),
        ("text_encoders", "e", "t5_fp8_scaled"),
        ("checkpoints", "d", "demo_all"),
        ("loras", "l", "turn"),
    ):
        target = comfy / "models" / kind / f"{name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"{file}.safetensors", target)
    for name in ("one/other_vae", "two/third_vae"):
        (disk / name).parent.mkdir(parents=True)
        shutil.copy(folder / "c.safetensors", disk / f"{name}.safetensors")
    lines = f"mine:\n  base_path: {disk}\n  is_default: true\n  vae: |\n    one\n    two\n  clip: texts\n"
    (comfy / "extra_model_paths.yaml").write_text(lines)
    return comfy


def names(**files_of_parts: Path) -> dict[str, Path]:
    return {part: file.absolute() for part, file in files_of_parts.items()}


# ── words ────────────────────────────────────────────────────────────────────────────


def test_a_part_is_written_or_told_by_its_file(folder: Path) -> None:
    variant = resolve("ltx-demo")
    assert weights_of(variant, [f"transformer={folder / 'b.safetensors'}"]) == names(
        transformer=folder / "b.safetensors"
    )
    assert weights_of(variant, {"vae": folder / "c.safetensors"}) == names(vae=folder / "c.safetensors")
    assert weights_of(variant, [str(folder / "c.safetensors")]) == names(vae=folder / "c.safetensors")
    assert weights_of(variant, [str(folder / "e.safetensors")]) == names(text_encoder=folder / "e.safetensors")
    both = weights_of(variant, [str(folder / "d.safetensors")])
    assert both == names(transformer=folder / "d.safetensors", vae=folder / "d.safetensors")


def test_a_file_that_tells_which_model_it_is(folder: Path) -> None:
    named = named_files(str(folder / "b.safetensors"), [f"vae={folder / 'c.safetensors'}"])
    assert named.model == "ltx-demo"
    assert named.files == names(transformer=folder / "b.safetensors", vae=folder / "c.safetensors")
    assert named_files(str(folder / "d.safetensors"), []).files.keys() == {"transformer", "vae"}
    assert named_files("ltx-demo", []).files == {}


def test_paths_stay_as_they_are_once_they_are_known(folder: Path) -> None:
    options = LoadOptions(weights=[str(folder / "d.safetensors")], loras=[f"{folder / 'l.safetensors'}:0.5"])
    model, once = with_paths("ltx-demo", options)
    assert with_paths(model, once) == (model, once)
    assert files_of(once) == names(transformer=folder / "d.safetensors", vae=folder / "d.safetensors")
    assert once.loras == [f"{folder / 'l.safetensors'}:0.5"]


def test_experts_are_called_high_and_low(folder: Path) -> None:
    variant = resolve("wan-2.2-t2v-a14b")
    words = [f"high={folder / 'a.safetensors'}", f"low={folder / 'b.safetensors'}"]
    assert list(weights_of(variant, words)) == ["transformer", "transformer_2"]
    with pytest.raises(UserError, match=r"wan-2\.1-t2v-14b has no part 'low'; it has transformer, vae, text_encoder"):
        weights_of(resolve("wan-2.1-t2v-14b"), words[1:])


@pytest.mark.heavy
def test_variants_that_share_a_network_are_listed(tmp_path: Path) -> None:
    file = files.header(tmp_path / "wan.safetensors", shapes_of("wan-2.2-t2v-a14b"))
    with pytest.raises(ModelError) as caught:
        named_files(str(file), [])
    said = str(caught.value)
    assert "it is the transformer of skyreels-v2-t2v-14b-540p" in said
    assert "of wan-2.1-t2v-14b and of wan-2.2-t2v-a14b, which are one network; say which: model='skyreels" in said
    pair = named_files(str(file), [f"low={file}"])  # a model that has two of them
    assert (pair.model, list(pair.files)) == ("wan-2.2-t2v-a14b", ["transformer", "transformer_2"])
    with pytest.raises(UserError, match=r"has 2 parts of this network; say which: weights=\['high="):
        weights_of(resolve("wan-2.2-t2v-a14b"), [str(file)])
    with pytest.raises(UserError, match=r"is the transformer of .*, not of ltx-2b-0\.9\.5; give model="):
        weights_of(resolve("ltx-2b-0.9.5"), [str(file)])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["transformer=/no/such.safetensors"], "/no/such.safetensors does not exist; give PART=FILE"),
        (["transformer=/tmp"], "/tmp is a folder; give PART=FILE"),
        (["=x"], "write PART=FILE, such as transformer=model.safetensors"),
        (["unet={a}"], "ltx-demo has no part 'unet'; it has transformer, vae, text_encoder"),
        (["transformer={a}", "transformer={b}"], "transformer is given twice; give it once"),
        (["{d}", "vae={c}"], "vae is given twice"),
        (["{l}"], "is a LoRA, which goes onto a model's own weights: give a model, and loras=['"),
    ],
)
def test_words_that_are_wrong(words: list[str], says: str, folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        weights_of(resolve("ltx-demo"), [w.format(**{f.stem: f for f in folder.iterdir()}) for w in words])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("c", "holds a AutoencoderKLLTXVideo of ltx-demo alone: give a model, and --weights vae="),
        ("e", "is a T5 text encoder: give a model, and --weights text_encoder="),
        ("l", "is a LoRA, which goes onto a model's own weights: give a model, and --lora "),
    ],
)
def test_files_that_are_no_model(name: str, says: str, folder: Path, run: Any) -> None:
    refused(run("overcrank", "render", "x", "--model", folder / f"{name}.safetensors"), says)


def test_more_refusals(folder: Path, tmp_path: Path, run: Any) -> None:
    other = files.saved(tmp_path / "other.safetensors", {"conv.kernel": files.weights("vae")["latents_mean"]})
    refused(
        run("overcrank", "render", "x", "--model", other), "is of no model that overcrank has, by its tensors (conv"
    )
    refused(run("overcrank", "render", "x", "--model", tmp_path / "gone.gguf"), "gone.gguf does not exist")
    (tmp_path / "x.ckpt").write_bytes(b"\x80")
    refused(run("overcrank", "render", "x", "--model", tmp_path / "x.ckpt"), "is a pickle, which runs code")
    refused(
        run("overcrank", "render", "x", "--lora", folder / "a.safetensors"),
        "it is a model's transformer, no LoRA",
    )
    refused(run("overcrank", "render", "x", "--lora", folder / "e.safetensors"), "it is a T5 text encoder, no LoRA")
    refused(run("overcrank", "build", "--model", folder / "a.safetensors", "--gpu", "sm_89"), "overcrank inspect")


# ── a ComfyUI tree ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("inner", ["", "models"])
def test_names_of_a_comfyui_tree(inner: str, tree: Path) -> None:
    parts = {"transformer": "ltx\\demo_fp8_scaled", "vae": "third_vae", "text_encoder": "t5_fp8_scaled"}
    words = [f"{part}={name}.safetensors" for part, name in parts.items()]
    options = LoadOptions(comfy=tree / inner, weights=words, loras=["turn.safetensors:0.5"])
    _, named = with_paths("ltx-demo", options)
    own = files_of(named)
    assert own["transformer"] == tree / "models" / "diffusion_models" / "ltx" / "demo_fp8_scaled.safetensors"
    assert own["vae"] == tree.parent / "disk" / "two" / "third_vae.safetensors"
    assert named.loras == [f"{tree / 'models' / 'loras' / 'turn.safetensors'}:0.5"]
    model, named = with_paths("demo_all.safetensors", LoadOptions(comfy=tree))
    assert (model, set(files_of(named))) == ("ltx-demo", {"transformer", "vae"})
    model, named = with_paths("demo_fp16.safetensors", LoadOptions(comfy=tree, weights=["demo_vae.safetensors"]))
    assert (model, set(files_of(named))) == ("ltx-demo", {"transformer", "vae"})


def test_the_tree_of_the_environment(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERCRANK_COMFY", str(tree))
    assert with_paths("demo_fp16.safetensors", LoadOptions())[0] == "ltx-demo"


def test_a_name_that_is_not_there(tree: Path, tmp_path: Path, run: Any) -> None:
    render = ["render", "x", "--comfy", tree]
    says = "has no 'demo_fp8_scaled.safetensors' in its diffusion_models, checkpoints; did you mean ltx/demo_fp8_scaled"
    refused(run("overcrank", *render, "--weights", "transformer=demo_fp8_scaled.safetensors"), says)
    refused(run("overcrank", *render, "--weights", "vae=demo_vea.safetensors"), "did you mean demo_vae.safetensors")
    refused(run("overcrank", *render, "--model", "demo_fp.safetensors"), "did you mean demo_fp16.safetensors")
    refused(run("overcrank", *render, "--lora", "trun.safetensors"), "did you mean turn.safetensors")
    refused(run("overcrank", "render", "x", "--comfy", tmp_path), "it has neither models nor extra_model_paths.yaml")


@pytest.mark.parametrize(
    ("text", "says"), [("mine: [", "cannot be read as YAML"), ("- a\n- b", "is no table of folders")]
)
def test_a_yaml_file_that_is_broken(text: str, says: str, tree: Path) -> None:
    (tree / "extra_model_paths.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        comfy_tree(tree)


def test_yaml_paths_are_relative_to_their_file(tree: Path) -> None:
    (tree / "extra_model_paths.yaml").write_text("a:\n  base_path: ../disk\n  vae: one\nb:\n  vae: ../disk/two\nc:\n")
    folders = [folder.resolve() for folder in comfy_tree(tree).folders["vae"]]
    disk = tree.parent.resolve() / "disk"
    assert folders == [tree.resolve() / "models" / "vae", disk / "one", disk / "two"]


# ── renders ──────────────────────────────────────────────────────────────────────────

STEPS = ["--steps", 2, "--backend", "eager", "--quiet"]


@pytest.mark.heavy
def test_a_render_of_single_files_is_that_of_the_folder(tree: Path, folder: Path, tmp_path: Path, run: Any) -> None:
    def rendered(name: str, *words: object) -> dict[str, Any]:
        result = run("overcrank", "render", "a red circle moving right", "-o", tmp_path / f"{name}.mp4", *STEPS, *words)
        assert result.exit_code == 0, result.output
        about: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        return about

    usual = rendered("usual")
    same = rendered("same", "--model", folder / "d.safetensors")
    assert same["frames_sha256"] == usual["frames_sha256"]
    assert same["weights"]["vae"]["file"] == "d.safetensors"
    words = ["--weights", "text_encoder=t5_fp8_scaled.safetensors", "--lora", "turn.safetensors"]
    scaled = rendered("scaled", "--comfy", tree, "--model", "demo_fp16.safetensors", *words)
    assert scaled["frames_sha256"] != usual["frames_sha256"]
    assert set(scaled["weights"]) == {"transformer", "text_encoder"}
    assert scaled["loras"][0]["file"] == "turn.safetensors"


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["fp8", "prefixed", "gguf"])
def test_text_encoders_of_single_files(form: str, tmp_path: Path) -> None:
    import torch
    from overcrank.runtime.pipeline.encoders import encoder_of

    checkpoint, own = local_folder("ltx-demo"), files.weights("text_encoder")
    assert checkpoint is not None
    more = {"spiece_model": torch.arange(9, dtype=torch.uint8), "logit_scale": torch.ones(())}
    if form == "gguf":
        file = files.gguf(tmp_path / "t5.gguf", _llama_names(own), "t5encoder")
    elif form == "fp8":
        file = files.saved(tmp_path / "t5.safetensors", files.fp8(own, "scale_weight", told=False) | more)
    else:
        prefixed = {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in own.items()}
        file = files.saved(tmp_path / "t5.safetensors", prefixed | more)
    usual = files.saved(tmp_path / "usual.safetensors", own)
    words = torch.arange(1, 20)[None]
    with torch.no_grad():
        given, wanted = (encoder_of(f, checkpoint, "text_encoder", torch.float32)(words)[0] for f in (file, usual))
    assert torch.nn.functional.cosine_similarity(given.flatten(), wanted.flatten(), 0) > 0.99
    assert torch.equal(given, wanted) == (form == "prefixed")


def _llama_names(state: dict[str, Any]) -> dict[str, Any]:
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 8)
    return {str(table.get_name(name, try_suffixes=(".weight",))): tensor for name, tensor in state.items()}


@pytest.mark.heavy
def test_a_pack_of_a_single_file_is_that_of_the_folder(
    folder: Path, shared_store: Path, tmp_path: Path, run: Any
) -> None:
    from safetensors.torch import load_file

    for name, words in {"own": (), "file": ("--weights", folder / "a.safetensors")}.items():
        options = ["--precision", "int8", "--store", shared_store, "-o", tmp_path / name, "--quiet"]
        result = run("overcrank", "pack", "--model", "ltx-demo", *options, *words)
        assert result.exit_code == 0, result.output
    own, given = (load_file(tmp_path / name) for name in ("own", "file"))
    assert own.keys() == given.keys()
    assert all(bool((own[name] == given[name]).all()) for name in own)


@pytest.mark.heavy
def test_a_bundle_is_verified_with_a_single_file(folder: Path, demo_bundle: Path, demo_store: Path, run: Any) -> None:
    verify = ["verify", demo_bundle.name, "--store", demo_store]
    result = run("overcrank", *verify, "--weights", folder / "b.safetensors")
    assert result.exit_code == 0, result.output
    refused(
        run("overcrank", *verify, "--weights", f"transformer={folder / 'c.safetensors'}"), "it is the vae of ltx-demo"
    )
    refused(
        run("overcrank", *verify, "--checkpoint", folder / "a.safetensors"), "is no folder; give a diffusers folder"
    )
    report = ["--report", folder / "report", "--weights", folder / "b.safetensors"]
    refused(run("overcrank", *verify, *report), "--report renders a whole checkpoint")


@pytest.mark.parametrize(
    ("form", "target", "says"),
    [
        (
            "fp8",
            "sm_86",
            "ltx-demo: 60 layers in fp8_e4m3 are quantized anew as int8, since sm_86 does not multiply them",
        ),
        (
            "nvfp4",
            "sm_89",
            "ltx-demo: 60 layers in nvfp4 are quantized anew as fp8, since sm_89 does not multiply them",
        ),
        ("int8", "sm_86", ""),
    ],
)
def test_what_a_card_does_not_multiply_is_said_before_anything_is_fetched(
    form: str, target: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from overcrank.engines.cards import Card
    from overcrank.runtime.pipeline import parts
    from overcrank.runtime.sessions import stored_report

    make = {"fp8": files.fp8, "int8": files.int8, "nvfp4": files.nvfp4}[form]
    file = files.saved(tmp_path / "f.safetensors", make(files.original(files.weights("transformer"))))
    monkeypatch.setattr(parts, "card_of", lambda device: Card(0, "card", target, 0, 0, "580"))
    monkeypatch.setattr(stored_report, "_told", set())
    variant = resolve("ltx-demo")
    for _ in range(2):
        parts.warn_of_card(parts.require_parts({"transformer": file}, variant), variant, "cuda")
    assert [says] * bool(says) == [line.partition(" as they are")[0] for line in caplog.messages]
