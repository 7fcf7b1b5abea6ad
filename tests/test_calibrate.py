"""From a calibration of the demo model to a rendered video and its report, through the public commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from overcrank import cli
from overcrank.engines.manifest import read_manifest
from overcrank.export.quantization.recipe import LayerFormat, Recipe, default_recipe, read_recipe
from overcrank.models import components, resolve
from overcrank.runtime.render import renderer
from PIL import Image

from tests.conftest import Once
from tests.test_bad_input import refused

STEPS = 4


def _run(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


FRAMES = ("clip-frames", "of-bundle-frames")


@pytest.fixture(scope="session")
def made(once: Once, shared_store: Path) -> Any:
    """(store, recipe) of the demo in fp8."""
    folder = once("calibrated", lambda part: _run(*calibration(shared_store, part / "recipe.json", "fp8")))
    return shared_store, folder / "recipe.json"


def calibration(store: Path, recipe: Path, precision: str, *more: object) -> list[object]:
    options = ["--precision", precision, "--samples", 2, "--steps", STEPS, "--store", store, "-o", recipe, "--quiet"]
    return ["calibrate", "--model", "ltx-demo", *options, *more]


def test_a_recipe_says_what_was_measured_and_where(made: Any) -> None:
    _, file = made
    recipe = read_recipe(file)
    assert recipe.precision == "fp8"
    assert recipe.calibration is not None
    assert (recipe.calibration.samples, recipe.calibration.steps) == (2, STEPS)
    assert len(recipe.calibration.checkpoint) == 64
    denoiser = recipe.components["denoiser"]
    ranges = denoiser.ranges["transformer"]
    operands = {name for name in ranges if name.endswith((".attn1.query", ".attn1.key", ".attn1.value"))}
    assert (len(ranges), len(operands)) == (52, 12)  # ten linear layers and a self-attention in four of six blocks
    assert denoiser.of("proj_out").format == "16bit"
    assert next(r.reason for r in denoiser.rules if r.layers == "*")
    assert not list(file.parent.glob(".*.part"))


def test_two_calibrations_are_the_same_and_an_interrupted_one_goes_on(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, first = made
    whole, denoised = renderer.encoded, list[int]()

    def broken(pipe: Any, variant: Any, request: Any) -> Any:
        """A sample's seed is its number; its text is encoded before it is denoised."""
        denoised.append(request.seed)
        if len(denoised) == 2:
            raise KeyboardInterrupt
        return whole(pipe, variant, request)

    monkeypatch.setattr(renderer, "encoded", broken)
    again = tmp_path / "recipe.json"
    result = CliRunner().invoke(cli.main, [str(a) for a in calibration(store, again, "fp8")])
    assert result.exit_code != 0
    assert not again.exists()
    _run(*calibration(store, again, "fp8"))
    assert denoised == [0, 1, 1]  # the finished sample is not denoised a second time
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize(("method", "precision"), [("percentile", "fp8"), ("mse", "int8")])
def test_histograms_give_ranges_within_the_largest_value(
    made: Any, tmp_path: Path, method: str, precision: str
) -> None:
    store, first = made
    _run(*calibration(store, tmp_path / "r.json", precision, "--method", method))
    largest = read_recipe(first).components["denoiser"].ranges["transformer"]
    found = read_recipe(tmp_path / "r.json").components["denoiser"].ranges["transformer"]
    assert all(0 < found[layer].amax <= 1.01 * largest[layer].amax for layer in found)
    assert any(found[layer].amax < 0.9 * largest[layer].amax for layer in found)


def test_smoothquant_moves_outliers_into_the_weights(made: Any, tmp_path: Path) -> None:
    store, _ = made
    _run(*calibration(store, tmp_path / "r.json", "int8", "--method", "smoothquant"))
    ranges = read_recipe(tmp_path / "r.json").components["denoiser"].ranges["transformer"]
    assert all(r.smoothing and len(r.smoothing) in (128, 512) for r in ranges.values())
    refused(
        CliRunner().invoke(
            cli.main, [str(a) for a in calibration(store, tmp_path / "s.json", "fp8", "--method", "smoothquant")]
        ),
        "--method smoothquant is for int8",
    )


def test_engines_and_renders_take_the_recipe(made: Any, tmp_path: Path, run: Any) -> None:
    store, recipe = made
    build = ["--model", "ltx-demo", "--gpu", "sm_89", "--precision", "fp8", "--recipe", recipe, "--store", store]
    built = run("build-engine", *build, "--components", "denoiser", "--json")
    assert built.exit_code == 0, built.output
    bundle = Path(json.loads(built.output)["bundles"][0]["path"])
    entry = read_manifest(bundle).component("denoiser")
    assert len(entry.formats) == 44
    assert "40 GEMMs in fp8, 4 attentions in fp8" in entry.verdict
    assert (bundle / "recipe.json").read_bytes() == recipe.read_bytes()
    report = tmp_path / "report"
    checked = run("overcrank", "verify", bundle, "--report", report, "--samples", 1, "--steps", STEPS, "--store", store)
    assert checked.exit_code == 0, checked.output
    figures = {(d["name"], d["against"]): d for d in json.loads((report / "report.json").read_text())["differences"]}
    assert 0.99 < min(figures["fp8", "eager fp32"]["cosines"]) < 1
    assert figures["another seed", "eager fp32"]["psnr"] < figures["fp8", "eager fp32"]["psnr"] - 5
    assert {p.name for p in report.iterdir()} == {"report.md", "report.json", "steps.png", "layers.png", "frames.png"}
    out = tmp_path / "clip.png"
    arguments = ["--precision", "fp8", "--recipe", recipe, "--backend", "onnxruntime", "--steps", STEPS]
    shown = run("overcrank", "render", "--prompt", "a red circle", *arguments, "--store", store, "-o", out)
    assert shown.exit_code == 0, shown.output
    of_bundle = ["--bundle", bundle, "--backend", "onnxruntime", "--steps", STEPS, "--precision", "fp8"]
    of_bundle += ["--store", store]
    again = run("overcrank", "render", "--prompt", "a red circle", *of_bundle, "-o", tmp_path / "of-bundle.png")
    assert again.exit_code == 0, again.output
    about = json.loads((tmp_path / "of-bundle.json").read_text())
    assert about["bundles"] == {"denoiser": bundle.name}
    frames = [np.stack([np.asarray(Image.open(f)) for f in sorted((tmp_path / n).iterdir())]) / 255.0 for n in FRAMES]
    assert np.square(frames[0] - frames[1]).mean() < 1e-5, "the recipe in the bundle gives other ranges"


def test_what_is_not_finite_is_named(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = made
    whole = renderer.encoded

    def poisoned(pipe: Any, *rest: Any) -> Any:
        pipe.transformer.transformer_blocks[3].ff.net[0].proj.weight.data[0, 0] = np.nan
        return whole(pipe, *rest)

    monkeypatch.setattr(renderer, "encoded", poisoned)
    result = CliRunner().invoke(cli.main, [str(a) for a in calibration(store, tmp_path / "r.json", "fp8")])
    assert result.exit_code == 1
    assert (
        "the input of transformer.transformer_blocks.3.ff.net.2 is not finite at call 1 of the network" in result.output
    )
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty; write one prompt a line"), (b"a caf\xe9", "is not UTF-8 (byte 5)")],
)
@pytest.mark.quick
def test_prompts_that_cannot_be_read(content: bytes, says: str, tmp_path: Path, run: Any) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    refused(run("overcrank", "calibrate", "--precision", "fp8", "--prompts", tmp_path / "p.txt"), says)


def test_requests_that_cannot_be_met(seeded: Callable[[Path], Path], tmp_path: Path, run: Any) -> None:
    refused(run("overcrank", "calibrate", "--precision", "fp8", "--samples", 0), "--samples 0 measures nothing")
    recipe = tmp_path / "r.json"
    component = components(resolve("ltx-demo"), ("denoiser",))[0]
    made = Recipe(
        model="ltx-demo",
        precision="fp8",
        components={"denoiser": default_recipe(component, LayerFormat("fp8", "dynamic"))},
    )
    recipe.write_text(made.model_dump_json())
    store = seeded(tmp_path / "s")
    build = ["build-engine", "--gpu", "sm_89", "--store", store, "--recipe", recipe, "--precision"]
    refused(run(*build, "fp8", "--model", "ltx"), "of another architecture")
    refused(run(*build, "int8", "--model", "ltx-demo"), "is for fp8, not for --precision int8")
    recipe.write_text("{}")
    refused(run(*build, "fp8", "--model", "ltx-demo"), "r.json: model: Field required")
    nvfp4 = ["--gpu", "sm_120", "--precision", "nvfp4", "--activations", "16bit"]
    refused(run("build-engine", "--model", "ltx-demo", *nvfp4), "nvfp4 multiplies activations in nvfp4 too")
    fixed = ["--store", store, "--gpu", "sm_89", "--precision", "fp8", "--embed-weights"]
    fixed += ["--activations", "static", "--components", "denoiser"]
    refused(run("build-engine", "--model", "ltx-demo", *fixed), "needs a range that no recipe gives; calibrate this")
    refused(run("overcrank", "render", "--prompt", "x", "--precision", "fp6"), "--precision fp6: use auto, fp8")


@pytest.mark.quick
def test_ranges_missing_from_a_recipe_are_asked_for(tmp_path: Path) -> None:
    from overcrank.engines.module_refusals import NoRange
    from overcrank.engines.refusals import CannotServe
    from overcrank.runtime.sessions.parameters import packed_parameters

    module = torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16)})
    with pytest.raises(CannotServe) as caught:
        packed_parameters(module, {"a": LayerFormat("fp8", "static")}, {}, "bfloat16")
    assert caught.value.why == NoRange("a")


def test_a_pack_renders_what_the_weights_do(made: Any, tmp_path: Path, run: Any) -> None:
    store, recipe = made
    pack = tmp_path / "pack.safetensors"
    common = ["--precision", "fp8", "--recipe", recipe, "--store", store]
    _run("pack", "--model", "ltx-demo", *common, "-o", pack, "--quiet")
    shown = ["--prompt", "a red circle", "--backend", "onnxruntime", "--steps", 2, "--formats", "latents", "--quiet"]
    for name, more in {"with": ("--pack", pack), "without": ()}.items():
        _run("render", *shown, *common, *more, "-o", tmp_path / name)
    latents = [(tmp_path / f"{name}.latents.safetensors").read_bytes() for name in ("with", "without")]
    assert latents[0] == latents[1]
    from safetensors import safe_open

    with safe_open(pack, framework="pt") as opened:
        assert len(opened.keys()) == 140  # weight and two factors of forty layers, five of four attentions
        assert opened.metadata()["recipe"] == read_recipe(recipe).digest()


def test_packs_that_do_not_fit_are_refused(made: Any, tmp_path: Path, run: Any) -> None:
    from overcrank.errors import CheckpointError
    from overcrank.export.quantization.pack import read_pack

    store, recipe = made
    pack = tmp_path / "pack.safetensors"
    _run("pack", "--model", "ltx-demo", "--precision", "int8", "--store", store, "-o", pack, "--quiet")
    layout = read_recipe(recipe).components["denoiser"].digest()
    with pytest.raises(CheckpointError, match="does not match the engine: layout"):
        read_pack(pack, "transformer", "denoiser", layout, "bfloat16")
    pack.write_bytes(pack.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as a weight pack"):
        read_pack(pack, "transformer", "denoiser", layout, "bfloat16")
    common = ["--store", store, "-o", tmp_path / "p", "--quiet"]
    static = ["--precision", "fp8", "--activations", "static"]
    refused(run("overcrank", "pack", "--model", "ltx-demo", *static, *common), "needs a range that no recipe gives")
    assert not (tmp_path / "p").exists()
    lonely = ["render", "--prompt", "x", "--pack", pack, "--store", store]
    refused(run("overcrank", *lonely), "add --precision fp8")


@pytest.mark.parametrize(("precision", "gpu"), [("fp8", "sm_89"), ("nvfp4", "sm_120")])
def test_quantized_weights_can_be_embedded(made: Any, precision: str, gpu: str, tmp_path: Path, run: Any) -> None:
    store, recipe = made
    common = ["--model", "ltx-demo", "--gpu", gpu, "--precision", precision, "--store", store, "--json"]
    common += ["--components", "denoiser"] + (["--recipe", recipe] if precision == "fp8" else [])
    keys = set()
    for kind, more in (("inputs", []), ("embedded", ["--embed-weights"])):
        result = run("build-engine", *common, *more)
        assert result.exit_code == 0, result.output
        manifest = read_manifest(Path(json.loads(result.output)["bundles"][0]["path"]))
        assert manifest.weights.startswith(kind)
        assert f"40 GEMMs in {precision}" in manifest.component("denoiser").verdict
        keys.add(manifest.component("denoiser").key.recipe)
    assert len(keys) == 2  # ranges decide an engine that holds its weights


def test_auto_keeps_the_most_sensitive_blocks_until_the_target_holds(made: Any, tmp_path: Path, run: Any) -> None:
    store, first = made
    easy, hard = tmp_path / "easy.json", tmp_path / "hard.json"
    _run(*calibration(store, easy, "fp8", "--auto", "--quality", "20dB"))
    shown = _run(*calibration(store, hard, "fp8", "--auto", "--quality", "0.995"))
    plain = read_recipe(first).components["denoiser"]
    assert read_recipe(easy).components["denoiser"].rules == plain.rules
    found = read_recipe(hard)
    kept = found.components["denoiser"].rules[: -len(plain.rules)]
    assert 1 <= len(kept) < 4
    assert all(r.format == "16bit" and r.reason.startswith("sensitive: alone it moves the output by") for r in kept)
    assert found.components["denoiser"].rules[len(kept) :] == plain.rules
    assert found.calibration is not None
    reached = float(found.calibration.quality.split()[1].rstrip(","))
    assert 0.995 <= reached < 1
    ranked = [line.split()[-1] for line in shown.output.splitlines() if "% of the output" in line]
    assert [r.layers for r in kept] == [f"{block}.*" for block in ranked[: len(kept)]]
    assert f"{len(kept)} of 4 blocks in 16 bit" in shown.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--quality", "35dB"), "--quality is what --auto searches for; add --auto"),
        (("--auto", "--quality", "1.5"), "--quality 1.5: give decibels (35dB), or a cosine below 1"),
        (("--auto", "--quality", "90dB"), "90 dB does not hold with any block quantized"),
    ],
)
def test_targets_that_mean_nothing(made: Any, options: tuple[str, ...], says: str, tmp_path: Path, run: Any) -> None:
    store, _ = made
    refused(run("overcrank", *calibration(store, tmp_path / "r.json", "fp8", *options)), says)
    assert not (tmp_path / "r.json").exists()


def test_pictures_to_calibrate_with_ship(tmp_path: Path) -> None:
    from overcrank.calibration.run import photographs
    from overcrank.engines.store import Store
    from PIL import Image

    pictures = []
    for file in photographs(Store(tmp_path)):
        with Image.open(file) as picture:
            assert picture.mode == "RGB"
            pictures.append(picture.tobytes())
    assert len(pictures) == len(set(pictures)) == 5


def test_a_recipe_of_another_checkpoint_is_refused(made: Any, tmp_path: Path, run: Any) -> None:
    store, file = made
    recipe = json.loads(file.read_text())
    recipe["calibration"]["checkpoint"] = "0" * 64
    other = tmp_path / "other.json"
    other.write_text(json.dumps(recipe))
    common = ["--model", "ltx-demo", "--precision", "fp8", "--recipe", other, "--store", store, "--quiet"]
    says = "the recipe was calibrated on another checkpoint: calibration.checkpoint is 0000000000000000…"
    refused(run("overcrank", "pack", *common, "-o", tmp_path / "p"), says)
    refused(run("overcrank", "render", "--prompt", "x", *common, "-o", tmp_path / "v.png"), says)
    assert {p.name for p in tmp_path.iterdir()} == {"other.json"}


def test_what_is_packed_is_kept_by_what_it_is_made_of(
    made: Any, seeded: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Two renders share a pack; other ranges, or a LoRA's other weights, make another; a damaged one is made anew."""
    _, recipe = made
    store = seeded(tmp_path / "s")
    shown = ["--prompt", "a red circle", "--backend", "onnxruntime", "--steps", 1, "--formats", "latents", "--quiet"]

    def rendered(name: str, *more: object) -> bytes:
        _run("render", *shown, "--precision", "fp8", "--store", store, "-o", tmp_path / name, *more)
        return (tmp_path / f"{name}.latents.safetensors").read_bytes()

    def packs() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (store / "packs").iterdir()}

    first = rendered("first", "--recipe", recipe)
    (file,) = (before := packs())
    assert rendered("second", "--recipe", recipe) == first
    assert packs() == before
    (store / "packs" / file).write_bytes(b"damaged")
    assert rendered("third", "--recipe", recipe) == first
    rendered("other")
    assert len(packs()) == 2
