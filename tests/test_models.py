from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from overcrank.errors import ModelError, ShapeError
from overcrank.models import check_shape, components, families, family, parameter_counts, resolve
from overcrank.models.base import Call, Variant, VideoShape
from overcrank.models.registry import variant_named

pytestmark = pytest.mark.quick

VARIANTS = [v for name in families() for v in family(name).variants]
# Parameters of the denoiser in billions, as the publishers state them (rounded).
STATED = {
    "ltx-upsampler": (0.125, 0.128),  # 505 MB in fp32
    "mochi": (9.9, 10.1),
    "ltx-demo": (0.0017, 0.0019),
    "ltx-2b": (1.8, 2.1),
    "ltx-13b": (12.5, 13.5),
    "ltx2-19b": (18.0, 20.0),
    "wan-2.1-vace-1.3b": (1.3, 2.3),
    "wan-2.1-vace-14b": (14.0, 17.5),
    "wan-2.1-t2v-1.3b": (1.3, 1.5),
    "wan-2.2-ti2v-5b": (4.8, 5.2),
    "wan-": (13.8, 16.6),
    "hunyuan-video-13b": (12.5, 13.5),
    "hunyuan-video-1.5": (8.0, 8.6),
    "framepack": (12.5, 13.5),
    "cosmos-predict1-7b": (6.8, 7.5),
    "cosmos-predict1-14b": (14.0, 14.9),
    "cosmos-predict2-14b": (14.0, 14.9),
    "cosmos-predict2.5-14b": (14.0, 14.9),
    "cosmos": (1.9, 2.2),
    "cogvideox-2b": (1.6, 1.8),
    "cogvideox": (5.4, 5.8),
    "svd": (1.4, 1.6),
    "animatediff-sd15": (1.2, 1.4),
    "animatediff-sdxl": (2.7, 3.1),
    "modelscope": (1.3, 1.5),
    "skyreels-v2-df-1.3b": (1.3, 1.5),
    "skyreels-v2-i2v-1.3b": (1.4, 1.7),
    "skyreels": (13.8, 16.6),
}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_published_configurations_build_the_stated_size(variant: Variant) -> None:
    from overcrank.export.module import abstract_module

    counts = parameter_counts(variant)
    assert set(counts) == {c.name for c in components(variant)}, "run bench/count_parameters.py"
    denoiser = next(c for c in components(variant) if c.name.startswith(("denoiser", "latent_upsampler")))
    module = abstract_module(denoiser, denoiser.config, "bf16")
    count = sum(p.numel() for p in module.parameters())
    assert counts[denoiser.name] == count
    low, high = next(r for prefix, r in STATED.items() if variant.name.startswith(prefix))
    assert low < count / 1e9 < high


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_native_and_bounding_shapes_are_valid(variant: object) -> None:
    for shape in (variant.native, variant.minimum, variant.maximum):  # type: ignore[attr-defined]
        check_shape(variant, shape)  # type: ignore[arg-type]


def test_ltx_shapes() -> None:
    for name in ("ltx-2b-0.9.0", "ltx-2b-0.9.1", "ltx-2b-0.9.5", "ltx-13b-0.9.8-distilled"):
        assert family("ltx").strides(resolve(name)) == (32, 8), name
    variant = resolve("ltx")
    assert family("ltx").latent(variant, VideoShape(512, 768, 121)) == (16, 16, 24)
    sizes = components(variant)[0].sizes(VideoShape(512, 768, 121, 2))
    assert sizes["tokens"] == 6144
    with pytest.raises(ShapeError, match=r"height 511 is not a multiple of 32 \(nearest: 480 or 512\); frames 8"):
        check_shape(variant, VideoShape(511, 768, 8))


def test_what_configurations_leave_out_is_not_missed() -> None:
    variant = resolve("ltx2-19b")
    ratios = ("spatial_compression_ratio", "temporal_compression_ratio")
    # The class: its patch, times two for each scaling; the published one has its own ratio in time
    bare = {k: v for k, v in variant.configs["vae"].items() if k not in ratios}
    for vae, steps in (
        (bare, (64, 16)),
        (bare | dict.fromkeys(ratios) | {"spatio_temporal_scaling": [True, True, True, False]}, (32, 8)),
        (bare | {"spatial_compression_ratio": 32}, (32, 16)),
    ):
        grid = family("ltx2").grid(replace(variant, configs={**variant.configs, "vae": vae}))
        assert (grid["height"][0], grid["frames"][0]) == steps
    forcing = resolve("skyreels-v2-df-14b-540p")
    pictured = {**forcing.configs["transformer"], "image_dim": 1280, "added_kv_proj_dim": 5120}
    made = family("skyreels").components(replace(forcing, configs={**forcing.configs, "transformer": pictured}))
    assert "image_encoder" not in [c.name for c in made]


def test_conditioning_is_not_run_on_the_engine_with_one_timestep() -> None:
    import torch

    from tests import tiny

    plain, conditioned = components(tiny.variant("tiny-ltx-0.9.5"), ("denoiser", "denoiser_conditioned"))
    from overcrank.export.module import random_module

    module = random_module(plain, plain.config, "fp32")
    sizes = {"batch": 2, "tokens": 6, "text": 4}
    call = conditioned.sample(module, sizes, torch.Generator().manual_seed(0))
    assert conditioned.adapt(module, Call(call))["timestep"].shape == (2, 6)
    with pytest.raises(ShapeError, match="needs the engine denoiser_conditioned"):
        plain.adapt(module, Call(call))


def test_the_documentation_is_what_the_data_says() -> None:
    from overcrank.cli.catalogue import markdown

    root = Path(__file__).parent.parent
    notes = (root / "docs/models.notes.md").read_text("utf-8")
    made = markdown(root / "bench/results", notes)
    assert (root / "docs/models.md").read_text("utf-8") == made, "run ./build.sh pages"


def test_models_are_listed_and_explained(run: Any) -> None:
    listed = run("overcrank", "models")
    assert listed.exit_code == 0, listed.output
    assert all(v.name in listed.output for v in VARIANTS)
    everything = json.loads(run("overcrank", "models", "--json").output)
    assert {m["name"] for m in everything["models"]} == {v.name for v in VARIANTS}
    shown = run("overcrank", "models", "show", "wan-2.2-ti2v-5b").output
    assert "5.0 B parameters" in shown
    assert "WanImageToVideoPipeline" in shown
    assert run("overcrank", "models", "show", "wam").exit_code == 2


def test_every_variant_is_known_by_its_name() -> None:
    for name in families():
        for variant in family(name).variants:
            assert variant.family == name
            assert variant_named(variant.name) is variant
            assert resolve(variant.name).name == variant.name
        assert resolve(name).name == family(name).default


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("model", "own"),
    [("ltx", "ltx"), ("ltx2-19b", "ltx2"), ("hunyuan-video-13b", "hunyuan_video"), ("wan-2.2-t2v-a14b", "wan")],
)
def test_a_name_imports_its_own_family_alone(model: str, own: str) -> None:
    code = (
        "import sys; from overcrank.models import families, local_folder, resolve\n"
        f"resolve({model!r}), local_folder({model!r})\n"
        "print([n for n in families() if f'overcrank.models.{n}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([own])


def test_model_names() -> None:
    assert resolve("ltx").name == "ltx-2b-0.9.5"
    assert resolve("Lightricks/LTX-Video-0.9.7-dev").name == "ltx-13b-0.9.7-dev"
    with pytest.raises(ModelError, match="did you mean ltx"):
        resolve("ltv")


def test_a_folder_is_known_by_its_configuration(tmp_path: Path, checkpoint: Path) -> None:
    assert resolve(str(checkpoint)).configs["transformer"]["num_layers"] == 5
    variant = resolve("ltx-13b-0.9.7-dev")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"transformer": ["diffusers", "LTXVideoTransformer3DModel"], "vae": ["diffusers", "x"]})
    )
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(variant.configs[part]))
    assert resolve(str(tmp_path)).native == variant.native, "the 13B architecture has the 13B native shape"
