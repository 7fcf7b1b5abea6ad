"""The demo's networks: LTX-Video's own classes with small widths, and a T5 encoder with its tokenizer."""

from __future__ import annotations

import string
from typing import Any

from overcrank.models import resolve
from overcrank.models.demo import FOLDER, captions

CONFIGS = resolve(FOLDER.name).configs
TEXT = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_heads": 4,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
SCHEDULER = {k: v for k, v in CONFIGS["scheduler"].items() if not k.startswith("_")}


def tokenizer() -> Any:
    """A T5 tokenizer of the captions' words; other words fall apart into letters."""
    from transformers import T5Tokenizer

    words = {*captions.COLOURS, *captions.SHAPES, *captions.BACKGROUNDS, *captions.DIRECTIONS}
    words |= {"grey", "a", "an", "the", "on"}
    words |= {*captions.VERBS, *captions.VERBS.values(), "background"}
    words |= {word.capitalize() for word in words}
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0)]
    vocabulary += [(f"▁{word}", -4.0) for word in sorted(words)]
    vocabulary += [(letter, -8.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=128)


def text_encoder(vocabulary: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**TEXT, vocab_size=vocabulary, is_encoder_decoder=False))


def vae() -> Any:
    from diffusers import AutoencoderKLLTXVideo

    return AutoencoderKLLTXVideo(**CONFIGS["vae"])


def denoiser() -> Any:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(**CONFIGS["transformer"])
