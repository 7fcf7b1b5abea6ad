"""The Target table: which GPU architecture takes which number format and TensorRT flavour.

Pure data from NVIDIA's compute-capability and TensorRT support matrices.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from overcrank.engines.cards import installed_cards
from overcrank.errors import TargetError
from overcrank.options import option

PRECISIONS = ("fp16", "bf16", "fp8", "int8", "nvfp4")
SIXTEEN_BIT = ("fp16", "bf16")


@dataclass(frozen=True)
class Target:
    """One GPU architecture, or with `members` several that one engine serves."""

    name: str
    generation: str
    cards: tuple[str, ...]
    precisions: tuple[str, ...]
    flavours: tuple[str, ...]
    fp32_products: bool = True  # TensorRT for RTX compiles none for Turing

    members: tuple[str, ...] = ()

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """TensorRT's ComputeCapability members, e.g. "SM89"."""
        return tuple(name.replace("_", "").upper() for name in self.members or (self.name,))

    def narrowed(self, precision: str) -> Target:
        """Of its members only those that have `precision`."""
        return replace(self, members=tuple(m for m in self.members if precision in BY_NAME[m].precisions))


_RTX, _CLASSIC = "tensorrt_rtx", "tensorrt"
_BOTH = (_RTX, _CLASSIC)

TARGETS: tuple[Target, ...] = (
    Target(
        "sm_75",
        "Turing",
        ("rtx2060", "rtx2060super", "rtx2070", "rtx2070super", "rtx2080", "rtx2080super", "rtx2080ti", "titanrtx")
        + ("gtx1650", "gtx1650super", "gtx1650ti", "gtx1660", "gtx1660super", "gtx1660ti", "t4")
        + ("quadrortx3000", "quadrortx4000", "quadrortx5000", "quadrortx6000", "quadrortx8000"),
        ("fp16", "int8"),
        _BOTH,
        fp32_products=False,
    ),
    Target("sm_80", "Ampere", ("a100", "a30"), ("fp16", "bf16", "int8"), _BOTH),
    Target(
        "sm_86",
        "Ampere",
        ("rtx2050", "rtx3050", "rtx3050ti", "rtx3060", "rtx3060ti", "rtx3070", "rtx3070ti", "rtx3080", "rtx3080ti")
        + ("rtx3090", "rtx3090ti", "rtxa500", "rtxa1000", "rtxa2000", "rtxa3000", "rtxa4000", "rtxa4500", "rtxa5000")
        + ("rtxa5500", "rtxa6000", "a2", "a10", "a10g", "a16", "a40"),
        ("fp16", "bf16", "int8"),
        _BOTH,
    ),
    Target(
        "sm_89",
        "Ada",
        ("rtx4050", "rtx4060", "rtx4060ti", "rtx4070", "rtx4070super", "rtx4070ti", "rtx4070tisuper")
        + ("rtx4080", "rtx4080super", "rtx4090", "rtx4090d", "rtx500ada", "rtx1000ada", "rtx2000ada", "rtx3000ada")
        + ("rtx3500ada", "rtx4000ada", "rtx4000sffada", "rtx4500ada", "rtx5000ada", "rtx5880ada", "rtx6000ada")
        + ("l4", "l40", "l40s"),
        ("fp16", "bf16", "fp8", "int8"),
        _BOTH,
    ),
    Target("sm_90", "Hopper", ("h100", "h200", "gh200"), ("fp16", "bf16", "fp8", "int8"), (_CLASSIC,)),
    Target("sm_100", "Blackwell", ("b200", "gb200"), PRECISIONS, (_CLASSIC,)),
    Target(
        "sm_120",
        "Blackwell",
        ("rtx5050", "rtx5060", "rtx5060ti", "rtx5070", "rtx5070ti", "rtx5080", "rtx5090", "rtx5090d")
        + ("rtxpro500", "rtxpro1000", "rtxpro2000", "rtxpro3000", "rtxpro4000", "rtxpro4500", "rtxpro5000")
        + ("rtxpro6000",),
        PRECISIONS,
        _BOTH,
    ),
    Target("sm_121", "Blackwell", ("dgxspark", "gb10"), PRECISIONS, _BOTH),
    Target(
        "rtx",
        "Ampere, Ada and Blackwell",
        (),
        PRECISIONS,
        (_RTX,),
        members=("sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
    ),
)
BY_NAME = {t.name: t for t in TARGETS}
DECORATION = re.compile(
    r"\b(nvidia|geforce|tesla|laptop|mobile|gpu|max ?q|with|design|generation|blackwell|workstation|server|edition"
    r"|pcie|nvl|sxm\d?|hbm\d?e?|\d+ ?gb)\b"
)
"""What nvidia-smi adds to a card's name, and does not change its architecture."""
TOO_OLD = re.compile(
    r"(gtx|gt)?(6|7|8|9|10)[1-9][05](ti|m|mx|x)*|titan(x|xp|v|z|black)?|(p|v|k|m)(4|6|10|40|60|80|100)|mx\d+"
    r"|quadro(p|gp|gv|k|m)\d+"
)
"""Kepler to Volta."""
FLAVOUR_TITLES = {_RTX: "TensorRT for RTX", _CLASSIC: "TensorRT"}


def targets_for(words: Iterable[str], flavour: str) -> tuple[Target, ...]:
    """Targets named by `--gpu`: sm_XX, a card, "all" or "auto"; each served by `flavour`.

    Raises TargetError for an unknown name, a flavour that does not serve it, or "auto"
    on a machine without an NVIDIA card.
    """
    targets: dict[str, Target] = {}
    for word in words:
        for target in _named(word, flavour):
            if flavour not in target.flavours:
                raise TargetError(
                    f"{FLAVOUR_TITLES[flavour]} cannot build for {target.name} ({target.generation}: "
                    f"{', '.join(target.cards)}); use {option('flavour', 'tensorrt')} on a machine that has TensorRT, "
                    f"or one of {', '.join(t.name for t in TARGETS if flavour in t.flavours)}."
                )
            targets[target.name] = target
    if not targets:
        raise TargetError(f"{option('gpu')} is empty; give sm_75 … sm_121, a card such as rtx4090, 'all' or 'auto'.")
    return tuple(targets.values())


def serves(target: str, precision: str, card: str) -> bool:
    """Whether an engine built for `target` at `precision` runs on a card of the architecture `card`."""
    entry = BY_NAME.get(target)
    return target == card or (entry is not None and card in entry.narrowed(precision).members)


def precision_for(target: Target, precision: str, own: str = "") -> str:
    """`precision`, or for "auto" `own` if the target has it, else its 16-bit type.

    Raises TargetError for a precision that the target does not have.
    """
    if precision not in ("auto", *PRECISIONS):
        raise TargetError(f"Unknown precision '{precision}': use auto, {', '.join(PRECISIONS)}.")
    if precision == "auto":
        return own if own in target.precisions else sixteen_bit(target)
    if precision not in target.precisions:
        have = [t.name for t in TARGETS if precision in t.precisions]
        raise TargetError(
            f"{target.name} ({target.generation}) has no {precision}: use {option('precision')} "
            f"{'|'.join(target.precisions)}; {precision} needs one of {', '.join(have)}."
        )
    return precision


def sixteen_bit(target: Target, precision: str = "auto") -> str:
    """The 16-bit type of a graph: `precision` if it is one, else bf16 where the target has it."""
    if precision in SIXTEEN_BIT:
        return precision
    return "bf16" if "bf16" in target.precisions else "fp16"


def _named(word: str, flavour: str) -> tuple[Target, ...]:
    key = _key(word)
    if key == "all":
        return tuple(t for t in TARGETS if flavour in t.flavours and not t.members)
    if key == "auto":
        return _local_cards()
    for target in TARGETS:
        if {key, f"rtx{key}", f"gtx{key}"} & {target.name.replace("_", ""), *target.cards}:
            return (target,)
    if TOO_OLD.fullmatch(key):
        raise TargetError(
            f"'{word}' is older than what {FLAVOUR_TITLES[flavour]} builds for: it needs an RTX 20, a GTX 16 or newer."
        )
    names = {_key(n): n for t in TARGETS for n in (t.name, *t.cards)}
    close = difflib.get_close_matches(key, names, n=3)
    hint = f"did you mean {' or '.join(names[c] for c in close)}? " if close else ""
    raise TargetError(
        f"Unknown GPU '{word}': {hint}Use {', '.join(BY_NAME)}, a card such as rtx4090, rtx-5090 or "
        f"dgx-spark, 'all', or 'auto'."
    )


def _key(word: str) -> str:
    """The letters and digits of a card's name that tell its architecture."""
    return re.sub(r"[^a-z0-9]", "", DECORATION.sub("", re.sub(r"[-/()]", " ", word.lower())))


def gpu_names(text: str) -> list[str]:
    """Of "rtx4090,NVIDIA GeForce RTX 4070 Laptop GPU" or "sm_89 sm_120": a name may have spaces in it."""
    names: list[str] = []
    for part in filter(None, map(str.strip, text.split(","))):
        words = part.split()
        names += words if not _is_known(part) and all(map(_is_known, words)) else [part]
    return names


def _is_known(word: str) -> bool:
    key = _key(word)
    names = {"all", "auto", *(n for t in TARGETS for n in (t.name.replace("_", ""), *t.cards))}
    return not names.isdisjoint({key, f"rtx{key}", f"gtx{key}"}) or TOO_OLD.fullmatch(key) is not None


def _local_cards() -> tuple[Target, ...]:
    """Of each kind of card on this machine."""
    try:
        cards = installed_cards()
    except TargetError as error:
        raise TargetError(
            f"{option('gpu', 'auto')} needs an NVIDIA card and driver on this machine, and {error}; name the card "
            f"instead, for example {option('gpu', 'rtx4090')} (no GPU is needed to build)."
        ) from error
    for card in cards:
        if card.target not in BY_NAME:
            raise TargetError(f"This machine's {card.name} is {card.target}, which is not among {', '.join(BY_NAME)}.")
    return tuple(dict.fromkeys(BY_NAME[card.target] for card in cards))
