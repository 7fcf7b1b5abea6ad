"""Small random checkpoints in the published layout of a variant: the repositories that its render is fetched from.

Every configuration is the published one (tests/published) but for the widths that tests/tiny.py shrinks; text
encoders, tokenizers and weights are small and random. Nothing here is read from the product's own data but which
repository a part lies in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import diffusers
import torch
from overcrank.models import resolve
from overcrank.models.base import Repository, Variant
from safetensors.torch import load_file, save_file

from tests import pipelines, tiny

FACTS = Path(__file__).parent / "published"
_Maker = Callable[[str], Any]


def _wan(cls: str, pictures: bool = False, **more: Any) -> _Maker:
    seen = {"image_processor": pipelines.clip_processor()} if pictures else {}
    return lambda name: pipelines.wan(name, cls, **more, **seen)


# By how a variant's name begins, the longest first; each makes the pipeline that the checkpoint was saved from.
MAKERS: dict[str, _Maker] = {
    "ltx-upsampler": pipelines.upsampler,
    "ltx-2b": lambda name: pipelines.ltx(name, "LTXPipeline"),
    "ltx-13b": pipelines.ltx,
    "ltx2": pipelines.ltx2,
    "wan-2.1-t2v": _wan("WanPipeline"),
    "wan-2.1-i2v": _wan("WanImageToVideoPipeline", pictures=True),
    "wan-2.1-flf2v": _wan("WanImageToVideoPipeline", pictures=True),
    "wan-2.1-vace": _wan("WanVACEPipeline"),
    "wan-2.2-ti2v": _wan("WanPipeline", expand_timesteps=True),
    "wan-2.2-t2v": pipelines.two_experts,
    "wan-2.2-i2v": lambda name: pipelines.two_experts(name, "WanImageToVideoPipeline", 0.9),
    "skyreels-v2-t2v": _wan("SkyReelsV2Pipeline"),
    "skyreels-v2-df": _wan("SkyReelsV2DiffusionForcingPipeline"),
    "skyreels-v2-i2v": _wan("SkyReelsV2ImageToVideoPipeline", pictures=True),
    "hunyuan-video-13b": lambda name: pipelines.hunyuan(name, "HunyuanVideoPipeline"),
    "hunyuan-video-13b-i2v": pipelines.hunyuan_i2v,
    "hunyuan-video-1.5": lambda name: (
        pipelines.hunyuan_15(name, "HunyuanVideo15ImageToVideoPipeline", **pipelines.siglip())
        if name.endswith("i2v")
        else pipelines.hunyuan_15(name, "HunyuanVideo15Pipeline")
    ),
    "framepack": pipelines.framepack,
    "cosmos-predict1": lambda name: pipelines.cosmos(
        name, "CosmosTextToWorldPipeline" if "text" in name else "CosmosVideoToWorldPipeline"
    ),
    "cosmos-predict2": lambda name: pipelines.cosmos(name, "Cosmos2VideoToWorldPipeline"),
    "cosmos-predict2.5": pipelines.cosmos_25,
    "cogvideox": lambda name: pipelines.cogvideox(
        name, "CogVideoXImageToVideoPipeline" if name.endswith("i2v") else "CogVideoXPipeline"
    ),
    "svd": pipelines.svd,
    "mochi": pipelines.mochi,
    "modelscope": pipelines.modelscope,
    "animatediff-sd15": pipelines.animatediff,
    "animatediff-sdxl": pipelines.animatediff_sdxl,
}


def facts(name: str) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((FACTS / f"{name}.json").read_text("utf-8"))
    return known


def published(root: Path, name: str) -> None:
    """Write the repositories of a variant under `root`, as tests/hub_server.py serves them."""
    variant = resolve(name)
    torch.manual_seed(0)
    pipe = MAKERS[max((start for start in MAKERS if name.startswith(start)), key=len)](name)
    work = root / ".work" / name
    if name.startswith("animatediff"):
        _image_model(pipe, work)
    else:
        pipe.save_pretrained(work)
        _as_published(work, name)
    for source in _sources(variant):
        _repository(root, work, source)
    shutil.rmtree(root / ".work")


def _as_published(work: Path, name: str) -> None:
    """Put the published values into the configurations that diffusers wrote of the small pipeline."""
    files = {file: entry["values"] for file, entry in facts(name)["files"].items() if "values" in entry}
    for file, values in files.items():
        part, _, kind = file.partition("/")
        if kind == "scheduler_config.json":
            _write(work / file, values)
        elif kind == "config.json" and tiny.shrunk(name, part):
            _write(work / file, values | dict(tiny.shrunk(name, part)))
    index, ours = files["model_index.json"], _read(work / "model_index.json")
    for part, entry in index.items():
        if isinstance(entry, list) and all(entry) and part not in ours:
            continue  # a part that no small one is made of
        of_text = isinstance(entry, list) and ("diffusers" not in entry)
        ours[part] = ours[part] if of_text and part in ours and all(entry) else entry
    _write(work / "model_index.json", ours)


def _sources(variant: Variant) -> tuple[Repository, ...]:
    """One that is published as a single file is a folder of its name, as its user converts it."""
    return (Repository(variant.name),) if variant.hub_file else variant.sources


def _repository(root: Path, work: Path, source: Repository) -> None:
    """The parts of a repository, and the index of the pipeline that it is published with."""
    at = source.id if source.revision == "main" else f"{source.id}@{quote(source.revision, safe='')}"
    parts = source.parts or tuple(p.name for p in work.iterdir() if p.is_dir())
    for part in parts:
        shutil.copytree(work / part, root / at / ("" if part == source.top else part), dirs_exist_ok=True)
        if source.files:
            _halved(root / at / part, source.files)
    if not source.top:
        shutil.copy(work / "model_index.json", root / at / "model_index.json")


def _halved(folder: Path, kind: str) -> None:
    """A twin of each weight file in half the bytes, named as the hub's are."""
    for file in folder.glob("*.safetensors"):
        halves = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(halves, file.with_name(f"{file.stem}.{kind}.safetensors"), {"format": "pt"})


def _image_model(pipe: Any, work: Path) -> None:
    """The image model and the motion adapter that make the pipeline, with random weights in the adapter too."""
    config, large = pipe.unet.config, hasattr(pipe, "text_encoder_2")
    more: dict[str, Any] = {}
    if large:
        more = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": config.addition_time_embed_dim,
            "projection_class_embeddings_input_dim": config.projection_class_embeddings_input_dim,
            "transformer_layers_per_block": config.transformer_layers_per_block, "use_linear_projection": True,
        }  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups, cross_attention_dim=config.cross_attention_dim,
        down_block_types=[k.replace("BlockMotion", "Block2D") for k in config.down_block_types],
        up_block_types=[k.replace("BlockMotion", "Block2D") for k in config.up_block_types],
        attention_head_dim=config.num_attention_heads, sample_size=8, **more,
    )  # fmt: skip
    for value in pipe.motion_adapter.parameters():  # a new one adds nothing
        torch.nn.init.normal_(value, std=0.1)
    parts = {k: v for k, v in pipe.components.items() if k not in ("unet", "motion_adapter", "scheduler")}
    parts |= {
        "unet": unet,
        "scheduler": diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1),
    }
    parts |= {"feature_extractor": None, "image_encoder": None}
    if large:
        whole = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        whole = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    whole.save_pretrained(work)
    pipe.motion_adapter.save_pretrained(work / "motion_adapter")


def at(root: Path, variant: Variant, part: str = "") -> Path:
    """The folder that the variant's part was written to; of the whole pipeline, if it is in one repository."""
    source = next(s for s in _sources(variant) if not part or part in s.parts)
    name = source.id if source.revision == "main" else f"{source.id}@{quote(source.revision, safe='')}"
    return root / name


def _read(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), "utf-8")
