"""Video pipelines that no family runs, and the answer that accelerate gives them."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
from overcrank.models import families
from torch import nn

WORDS = ("num_frames", "postprocess_video", "video")


def video_classes() -> Iterator[type]:
    """Pipeline classes of the installed diffusers whose text speaks of video."""
    seen: set[str] = set()
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        if not module.name.rpartition(".")[2].startswith("pipeline_") or not _file_speaks(module.name):
            continue
        try:
            found = vars(import_module(module.name))
        except (ImportError, RuntimeError):  # of packages that are not installed
            continue
        for name, value in found.items():
            own = inspect.isclass(value) and value.__module__ == module.name
            if (
                own
                and issubclass(value, diffusers.DiffusionPipeline)
                and name not in seen
                and _speaks(inspect.getsource(value))
            ):
                seen.add(name)
                yield value


def _file_speaks(module: str) -> bool:
    """Read before it is imported: most are of pictures, and importing them all takes long."""
    spec = find_spec(module)
    return spec is not None and _speaks(Path(str(spec.origin)).read_text("utf-8"))


def _speaks(text: str) -> bool:
    return any(word in text for word in WORDS)


_KANDINSKY, _EASY = "Kandinsky5Transformer3DModel", "EasyAnimateTransformer3DModel"
# Class → its denoiser's class, or "" where it has neither a transformer nor a unet.
UNSERVED: dict[str, str] = {
    "AllegroPipeline": "AllegroTransformer3DModel",
    "AnyFlowPipeline": "AnyFlowTransformer3DModel",
    "AnyFlowFARPipeline": "AnyFlowFARTransformer3DModel",
    "ChronoEditPipeline": "ChronoEditTransformer3DModel",
    "ConsisIDPipeline": "ConsisIDTransformer3DModel",
    "Cosmos3OmniPipeline": "Cosmos3OmniTransformer",
    "I2VGenXLPipeline": "I2VGenXLUNet",
    "TextToVideoZeroPipeline": "UNet2DConditionModel",
    "TextToVideoZeroSDXLPipeline": "UNet2DConditionModel",
    "EasyAnimatePipeline": _EASY,
    "EasyAnimateControlPipeline": _EASY,
    "EasyAnimateInpaintPipeline": _EASY,
    "HeliosPipeline": "HeliosTransformer3DModel",
    "HeliosPyramidPipeline": "HeliosTransformer3DModel",
    "Kandinsky5T2VPipeline": _KANDINSKY,
    "Kandinsky5I2VPipeline": _KANDINSKY,
    "Kandinsky6SRPipeline": "Kandinsky6SRTransformer3DModel",
    "Kandinsky6TI2VAPipeline": "Kandinsky6Transformer3DModel",
    "LattePipeline": "LatteTransformer3DModel",
    "LTX2LatentUpsamplePipeline": "",
    "LTX2VideoDiffusionDecodePipeline": "",
    "MotifVideoPipeline": "MotifVideoTransformer3DModel",
    "MotifVideoImage2VideoPipeline": "MotifVideoTransformer3DModel",
    "SanaVideoPipeline": "SanaVideoTransformer3DModel",
    "SanaImageToVideoPipeline": "SanaVideoTransformer3DModel",
    "SanaWMPipeline": "SanaWMTransformer3DModel",
    "WanAnimatePipeline": "WanAnimateTransformer3DModel",
}
# Where a class is that diffusers itself hides, as what it draws faces with is not installed.
ELSEWHERE = {"ConsisIDPipeline": "diffusers.pipelines.consisid.pipeline_consisid"}
# Their text speaks of video, as they take after a video pipeline; they make pictures.
PICTURES = (
    "CogView3PlusPipeline", "JoyImageEditPipeline", "JoyImageEditPlusPipeline", "Kandinsky5I2IPipeline",
    "Kandinsky5T2IPipeline",
)  # fmt: skip


def answer(name: str) -> str:
    """What accelerate says of a class that no family runs."""
    denoiser = UNSERVED[name]
    if not denoiser:
        return f"{name} has no transformer or unet; overcrank accelerates video diffusion pipelines."
    return f"{name}: no family here runs a {denoiser}; overcrank has {', '.join(families())}."


def bare(name: str) -> Any:
    """A pipeline of the class, its denoiser without layers and no other part: accelerate looks no further."""
    cls, denoiser = getattr(import_module(ELSEWHERE.get(name, "diffusers")), name), UNSERVED[name]
    pipe = cls.__new__(cls)
    parts: dict[str, Any] = dict.fromkeys(cls._get_signature_keys(cls)[0])
    if denoiser:
        network = getattr(diffusers, denoiser)
        part = next(part for part in ("transformer", "unet") if part in parts)
        parts[part] = network.__new__(network)
        nn.Module.__init__(parts[part])
    pipe.register_modules(**parts)
    return pipe
