"""Checkpoints that are not what their modules need: told before anything is computed, as the libraries see it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import overcrank
import pytest
import torch
import transformers
from overcrank.errors import CheckpointError, ModelError, UserError
from overcrank.export.expected import require_part
from overcrank.export.headers import read_header, tensors_in, twin_of, weight_files
from overcrank.models.demo import FOLDER
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tests import pipelines

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint."""
    return Path(shutil.copytree(FOLDER, tmp_path / "demo"))


def written(folder: Path, change: Callable[[Tensors], Tensors], file: str = WEIGHTS) -> Path:
    save_file({k: v.contiguous() for k, v in change(load_file(folder / file)).items()}, folder / file)
    return folder


def configured(folder: Path, file: str = "transformer/config.json", **fields: Any) -> Path:
    content = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return folder


def scaled(name: str) -> Callable[[Tensors], Tensors]:
    """fp8 weights of the blocks with a scale beside each, as Comfy and vLLM write them."""

    def change(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for key, value in tensors.items():
            made[key] = value
            if value.ndim == 2 and key.endswith(".weight") and "blocks" in key:
                scale = value.abs().max() / 448
                made[key] = (value / scale).to(FP8)
                made[name.format(key.removesuffix(".weight"))] = scale.reshape(1)
        return made

    return change


def plain_fp8(tensors: Tensors) -> Tensors:
    return {k: v.to(FP8) if v.ndim == 2 and "blocks" in k else v for k, v in tensors.items()}


def int8(tensors: Tensors) -> Tensors:
    return {k: (v * 50).to(torch.int8) if v.ndim == 2 and "blocks" in k else v for k, v in tensors.items()}


SCALES = ("{}.scale_weight", "{}.weight_scale", "{}.weight.scale", "{}.input_scale", "scaled_fp8", "{}.weight.absmax")


@pytest.mark.parametrize("name", SCALES)
def test_weights_whose_scales_nobody_reads_are_refused_on_every_road(folder: Path, run: Any, name: str) -> None:
    written(folder, scaled(name))
    says = r"tensor 'transformer_blocks\.\d\.\S+weight' is quantized \(F8_E4M3, with its scale in '"
    with pytest.raises(CheckpointError, match=says):
        overcrank.load(str(folder), backend="eager")
    if name != SCALES[0]:
        return
    measured = ["--precision", "int8", "--prompts", folder / "prompts.txt", "--out", folder / "recipe.json"]
    for words in (
        ["overcrank", "pack", "--model", folder, "--precision", "int8", "--out", folder / "pack"],
        ["overcrank", "calibrate", "--model", folder, *measured],
        ["build-engine", "--model", folder, "--gpu", "sm_89", "--embed-weights", "--components", "denoiser"],
    ):
        result = run(*words)
        assert result.exit_code == 2, (words, result.output)
        assert "is quantized (F8_E4M3, with its scale in 'transformer_blocks.0" in result.output
    assert not (folder / "pack").exists()
    assert not (folder / "recipe.json").exists()


def test_verify_looks_at_the_weights_it_is_given(folder: Path, run: Any, demo_store: Path, demo_bundle: Path) -> None:
    written(folder, scaled(SCALES[0]))
    result = run("overcrank", "verify", demo_bundle.name, "--checkpoint", folder, "--store", demo_store)
    assert result.exit_code == 2, result.output
    assert "is quantized (F8_E4M3, with its scale in" in result.output


@pytest.mark.parametrize("change", [int8, plain_fp8])
def test_bytes_that_are_the_weights_are_read(folder: Path, change: Any) -> None:
    """fp8 without scales has its values in it, and is what diffusers reads too; integers are not."""
    exact = diffusers.LTXVideoTransformer3DModel.from_pretrained(written(folder, change) / "transformer")
    if change is int8:
        with pytest.raises(CheckpointError, match=r"is quantized \(I8\)"):
            overcrank.load(str(folder), backend="eager")
        return
    mine = overcrank.load(str(folder), backend="eager").transformer
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), exact.parameters(), strict=True))


# ── against the libraries' own account ───────────────────────────────────────────────


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def renamed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {f"{prefix}{k}": v for k, v in tensors.items()}


def more(**tensors: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda own: own | {k.replace("__", "."): v for k, v in tensors.items()}


PARTS = {
    "transformer": (diffusers.LTXVideoTransformer3DModel, WEIGHTS),
    "text_encoder": (transformers.T5EncoderModel, "text_encoder/model.safetensors"),
    "vae": (diffusers.AutoencoderKLLTXVideo, "vae/diffusion_pytorch_model.safetensors"),
}
CHANGES: list[tuple[str, Callable[[Tensors], Tensors]]] = [
    ("transformer", lambda tensors: tensors),
    ("transformer", without("transformer_blocks.0.attn1.to_q.weight")),
    ("transformer", more(foo__bar=torch.zeros(3), ema__proj_in__weight=torch.zeros(2, 2))),
    ("transformer", renamed("model.diffusion_model.")),
    ("vae", without("decoder.conv_in.conv.weight")),
    ("vae", without("latents_mean")),
    ("text_encoder", lambda tensors: tensors),
    ("text_encoder", without("encoder.final_layer_norm.weight")),
    ("text_encoder", more(decoder__final_layer_norm__weight=torch.zeros(64), pooler__dense__weight=torch.zeros(2, 2))),
    ("text_encoder", lambda own: {k.replace("shared.", "encoder.embed_tokens."): v for k, v in own.items()}),
    ("text_encoder", without("shared.weight")),
]


@pytest.mark.parametrize(("part", "change"), CHANGES)
def test_missing_and_left_over_tensors_are_those_that_the_library_misses(
    folder: Path, caplog: pytest.LogCaptureFixture, part: str, change: Callable[[Tensors], Tensors]
) -> None:
    cls, file = PARTS[part]
    written(folder, change, file)
    _, info = cls.from_pretrained(folder / part, output_loading_info=True)
    buffers = {name for name, _ in cls.from_pretrained(FOLDER / part).named_buffers()}
    missing, unexpected = set(info["missing_keys"]) - buffers, set(info["unexpected_keys"])
    config = json.loads((folder / part / "config.json").read_text())
    tensors = tensors_in(weight_files(folder / part))
    library = cls.__module__.partition(".")[0]
    if missing:
        with pytest.raises(CheckpointError, match="has no tensor '") as caught:
            require_part(folder / part, library, cls.__name__, config, tensors)
        first, others = str(caught.value).split("'")[1], len(missing) - 1
        assert first in missing
        assert (f"nor {others} others" in str(caught.value)) == bool(others)
        return
    require_part(folder / part, library, cls.__name__, config, tensors)
    assert [n for n in unexpected if n in caplog.text] == sorted(unexpected, key=list(unexpected).index)
    assert ("has no place for" in caplog.text) == bool(unexpected)


def test_a_prefix_is_named(folder: Path) -> None:
    written(folder, renamed("model.diffusion_model."))
    with pytest.raises(CheckpointError, match=r"all its names begin with 'model\.diffusion_model\.'; save it again"):
        overcrank.load(str(folder), backend="eager")


FAMILIES = [n for n in pipelines.CASES if n in ("wan-image", "hunyuan_video", "mochi", "svd", "ltx2", "animatediff")]


@pytest.mark.parametrize("name", [*FAMILIES, "hunyuan_video-1.5"])
def test_what_diffusers_itself_saved_is_whole(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from overcrank.models import resolve
    from overcrank.runtime.pipeline.checkpoint import file_variant, require_whole

    saved = pipelines.saved(name, tmp_path)
    variant = resolve(str(saved))
    for task in variant.tasks.values():
        cls = getattr(diffusers, task)
        if task == json.loads((saved / "model_index.json").read_text())["_class_name"]:
            require_whole(saved, cls, file_variant(saved, variant))
            break
    else:
        pytest.fail(f"{saved} is of no task's class")
    assert "has no place for" not in caplog.text


# ── parts, names and configurations ──────────────────────────────────────────────────


def lost(*names: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def sharded(folder: Path, index: dict[str, str] | None = None) -> None:
    """Two files; with `index`, its weight_map changed so."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    mapped = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({k: tensors[k] for k in part}, folder / "transformer" / file)
        mapped |= dict.fromkeys(part, file)
    (folder / WEIGHTS).unlink()
    if index is not None:
        content = {"metadata": {}, "weight_map": mapped | index}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))


def linked(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../../blobs/deadbeef")


def pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n")


Q = "transformer_blocks.0.attn1.to_q.weight"
QUANTIZED: dict[str, Any] = {"quant_method": "gguf", "compute_dtype": "bfloat16"}
ODD: list[tuple[Callable[[Path], object], str]] = [
    (lost("tokenizer"), r"lacks the part 'tokenizer'"),
    (lost("tokenizer/tokenizer.json"), r"lacks the vocabulary of 'tokenizer'"),
    (lost("scheduler"), "lacks the part 'scheduler'"),
    (lost("vae"), "lacks the part 'vae'"),
    (lost("text_encoder/model.safetensors"), "lacks the weights of 'text_encoder'"),
    (lambda f: configured(f, "model_index.json", text_encoder=[None, None]), "names no text_encoder, and LTXPipeline"),
    (lambda f: configured(f, "model_index.json", tokenizer=...), "names no tokenizer, and LTXPipeline needs one"),
    (lambda f: configured(f, "model_index.json", _class_name=...), "has no _class_name"),
    (lambda f: configured(f, "model_index.json", vae=["diffusers"]), r"vae is \['diffusers'\], not a library and a"),
    (lambda f: sharded(f), r"whose index diffusion_pytorch_model\.safetensors\.index\.json is not there"),
    (
        lambda f: sharded(f, {Q: "../vae/diffusion_pytorch_model.safetensors"}),
        r"names '\.\./vae/\S+', which is no",
    ),
    (lambda f: sharded(f, {Q: "/etc/passwd"}), "names '/etc/passwd', which is no file beside it"),
    (lambda f: sharded(f, {Q: "..\\x.safetensors"}), "which is no file beside it"),
    (lambda f: sharded(f, {Q: "gone.safetensors"}), r"lacks transformer/gone\.safetensors, which the index"),
    (lambda f: (f / WEIGHTS).rename(f / "transformer/mine.safetensors"), r"mine\.safetensors may be it under another"),
    (linked, r"is a link to \.\./\.\./blobs/deadbeef, which is not there"),
    (pointer, "is a Git LFS pointer"),
    (lambda f: (f / WEIGHTS).write_bytes(b""), "is not a whole safetensors file .it is empty"),
    (lambda f: configured(f, num_layers=None), "has num_layers null, usually 28"),
    (lambda f: configured(f, num_layers="8"), 'has num_layers "8", usually 28'),
    (lambda f: configured(f, num_layers=10**12), "num_layers is 1,000,000,000,000, and its files hold 165 tensors"),
    (lambda f: configured(f, num_layers=4), "asks for 4 of transformer_blocks: it is another model's"),
    (lambda f: configured(f, num_layers=0), "asks for 0 of transformer_blocks"),
    (lambda f: configured(f, num_layers=8), r"has no tensor 'transformer_blocks\.6\.\S+' nor 49 others"),
    (lambda f: configured(f, cross_attention_dim=...), r"is \[128, 128\], the architecture needs \[128, 2048\]"),
    (lambda f: configured(f, quantization_config=QUANTIZED), "its quantization_config is of the kind 'gguf'"),
    (lambda f: configured(f, quantization_config={"quant_method": "mine"}), "of the kind 'mine', which diffusers"),
    (lambda f: configured(f, quantization_config="x"), "of the kind 'x', which diffusers"),
]


@pytest.mark.parametrize(("change", "says"), ODD)
def test_what_is_the_matter_is_said_in_a_sentence(
    folder: Path, change: Callable[[Path], object], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    change(folder)
    with pytest.raises((ModelError, CheckpointError), match=says):
        overcrank.load(str(folder), backend="eager")
    assert "which LTXVideoTransformer3DModel of the installed" not in caplog.text


def test_a_lone_twin_is_read(folder: Path) -> None:
    halves = {k: v.half() for k, v in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    save_file(halves, folder / "transformer/diffusion_pytorch_model.fp16.safetensors")
    loaded = dict(overcrank.load(str(folder), backend="eager").transformer.named_parameters())
    assert all(torch.equal(loaded[name], value.float()) for name, value in halves.items())
    assert not twin_of(["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"])


def test_torch_files_are_looked_at_too(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    file = folder / "transformer/diffusion_pytorch_model.bin"
    torch.save(tensors, file)
    loaded = dict(overcrank.load(str(folder), backend="eager").transformer.named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    torch.save(without(Q)(tensors), file)
    with pytest.raises(CheckpointError, match=f"has no tensor '{Q}'"):
        overcrank.load(str(folder), backend="eager")


def test_nan_weights_are_named_as_the_cause(folder: Path, tmp_path: Path, run: Any) -> None:
    written(folder, lambda own: own | {"proj_in.weight": own["proj_in.weight"] * float("nan")})
    words = ["--prompt", "a red circle", "--steps", 1, "--backend", "eager", "--quiet", "-o", tmp_path / "out"]
    result = run("overcrank", "render", "--model", folder, *words)
    assert result.exit_code == 1, result.output
    assert "transformer's proj_in.weight holds NaN or infinities" in result.output
    words = ["--model", folder, "--gpu", "sm_89", "--embed-weights", "--components", "denoiser", "--quiet"]
    result = run("build-engine", *words, "--store", tmp_path / "store")
    assert result.exit_code == 2, result.output
    assert "tensor 'proj_in.weight' holds NaN or infinities" in result.output


def test_a_small_model_takes_no_large_videos(folder: Path) -> None:
    from overcrank.models import resolve

    configured(folder, "model_index.json", _class_name="LTXConditionPipeline")
    for fields in ({"num_layers": 8}, {"attention_head_dim": 64}, {"in_channels": 16, "out_channels": 16}):
        assert resolve(str(configured(folder, **fields))).native == resolve("ltx-demo").native
    large = resolve("ltx-13b-0.9.7-dev")
    for part in ("transformer", "vae"):
        configured(folder, f"{part}/config.json", **large.configs[part])
    assert resolve(str(configured(folder, num_layers=40))).native == large.native


# ── headers, as safetensors itself takes them ────────────────────────────────────────


def headers() -> Iterator[dict[str, Any]]:
    good = {"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}
    yield good
    yield {"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "b": good["a"] | {"data_offsets": [4, 12]}}
    yield {"a": good["a"] | {"shape": [0]}}
    yield {"__metadata__": {"format": "pt"}, **good}
    for fields in (
        {"dtype": "F31"}, {"dtype": None}, {"shape": [2, 2]}, {"shape": "2"}, {"shape": [-2, -1]}, {"shape": [2.0]},
        {"data_offsets": [8, 0]}, {"data_offsets": [0, 8, 8]}, {"data_offsets": [4, 12]}, {"data_offsets": [0, 2**70]},
        {"shape": [2**62, 2**62], "data_offsets": [0, 2**63]},
    ):  # fmt: skip
        yield {"a": good["a"] | fields}
    yield good | {"b": good["a"]}
    yield {}


@pytest.mark.parametrize("header", list(headers()), ids=str)
@pytest.mark.parametrize("size", [0, 4, 8, 12])
def test_a_header_is_read_where_safetensors_reads_it(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    content = json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(content).to_bytes(8, "little") + content + bytes(size))
    try:
        with safe_open(file, "pt") as opened:
            wanted = {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()}  # noqa: SIM118
    except SafetensorError:
        with pytest.raises(CheckpointError, match=r"x\.safetensors is (not a whole|truncated)"):
            read_header(file)
        return
    assert {name: entry.shape for name, entry in read_header(file).items()} == wanted


# ── a pipeline that cannot be accelerated ────────────────────────────────────────────


def test_an_accelerate_that_fails_leaves_the_pipeline_as_it_was(tmp_path: Path, simulated: Any) -> None:
    from overcrank.errors import BackendError, StoreError

    pipe = overcrank.load("ltx-demo", device="cpu", backend="onnxruntime", store=tmp_path)
    earlier, modules = pipe.overcrank, list(pipe.overcrank.modules)
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    compiled = pipe.vae
    for error, options in (
        (BackendError, {"backend": "tensorrt"}),
        (StoreError, {"bundle": "NOPE"}),
        (StoreError, {"bundle": "NOPE", "backend": "onnxruntime"}),
        (UserError, {"backend": "none"}),
        (UserError, {"backend": "eager", "precision": "fp8"}),
    ):
        with pytest.raises(error):
            overcrank.accelerate(pipe, store=tmp_path, **options)
        assert pipe.overcrank is earlier
        assert earlier.modules == modules
        assert pipe.transformer.forward in modules
        assert pipe.vae is compiled


def test_what_is_not_done_on_a_processor_is_said(tmp_path: Path, run: Any) -> None:
    words = [
        "--prompt",
        "a red circle",
        "--steps",
        1,
        "--device",
        "cpu",
        "--formats",
        "latents",
        "-o",
        tmp_path / "out",
    ]
    result = run("overcrank", "render", *words, "--bundle", "NOPE")
    assert result.exit_code == 2
    assert "no bundle matches 'NOPE'" in result.output
    assert not list(tmp_path.glob("out*"))
    result = run("overcrank", "render", *words, "--precision", "fp8")
    assert "rendering with eager PyTorch, not in fp8: the pipeline is on cpu" in " ".join(result.output.split())
