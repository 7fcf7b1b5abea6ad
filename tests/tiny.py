"""One tiny configuration per layout of a family: what every shared test runs over.

Adding a family adds an entry here. Configurations keep the classes and the structure of the
published ones and shrink the widths; chains stay long enough to be repeated in the graph.
"""

from __future__ import annotations

from dataclasses import replace

from overcrank.engines.profiles import Profile
from overcrank.models import variant_from_configs
from overcrank.models.base import Variant, VideoShape

_LTX_DIT = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "caption_channels": 32,
    "num_layers": 5,
}
_LTX_VAE = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 16, 16, 16),
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (3, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 3, 1, 1),
    "patch_size": 1,
    "spatial_compression_ratio": 8,
}
_LTX_090 = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 16, 16),
    "decoder_block_out_channels": (8, 8, 16, 16),
    "layers_per_block": (1, 1, 1, 1, 3),
    "decoder_layers_per_block": (3, 1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "decoder_inject_noise": (False,) * 5,
    "downsample_type": ("conv",) * 4,
    "down_block_types": ("LTXVideoDownBlock3D",) * 4,
    "upsample_residual": (False,) * 4,
    "upsample_factor": (1, 1, 1, 1),
    "timestep_conditioning": False,
    "patch_size": 1,
    "spatial_compression_ratio": None,
    "temporal_compression_ratio": None,
}
_LTX_091 = _LTX_090 | {
    "decoder_block_out_channels": (8, 16),
    "decoder_layers_per_block": (2, 1, 1),
    "decoder_spatio_temporal_scaling": (True, True),
    "decoder_inject_noise": (True, True, False),
    "upsample_residual": (True, True),
    "upsample_factor": (2, 2),
    "timestep_conditioning": True,
}
_LTX = "LTXVideoTransformer3DModel"

CONFIGS = {
    "tiny-ltx-0.9.5": (_LTX, {"transformer": _LTX_DIT, "vae": _LTX_VAE}),
    "tiny-ltx-0.9.0": (_LTX, {"transformer": _LTX_DIT, "vae": _LTX_090}),
    "tiny-ltx-0.9.1": (_LTX, {"transformer": _LTX_DIT, "vae": _LTX_091}),
}


def variant(name: str) -> Variant:
    denoiser, configs = CONFIGS[name]
    small = variant_from_configs(name, denoiser, configs)
    return replace(
        small,
        native=VideoShape(64, 64, 17),
        minimum=VideoShape(32, 32, 1),
        maximum=VideoShape(96, 96, 33),
        text_length=16,
    )


def profile(name: str) -> Profile:
    made = variant(name)
    low, best, high = made.minimum, made.native, made.maximum
    return Profile(
        low, VideoShape(best.height, best.width, best.frames, 2), VideoShape(high.height, high.width, high.frames, 2)
    )
