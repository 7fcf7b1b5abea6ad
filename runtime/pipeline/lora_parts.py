"""Which part of a pipeline a LoRA file is for: the one that is written, that it fits, or that its name says."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from overcrank.errors import CheckpointError, UserError
from overcrank.options import option
from overcrank.runtime.pipeline.lora import Contents, Lora, LoraFile, Parts, listed, lora_option, read_contents
from overcrank.runtime.pipeline.lora_layouts import layout_of

log = logging.getLogger("overcrank")
_WRITTEN = re.compile(r"(?P<part>[A-Za-z_]\w*)=(?P<file>.+)", re.DOTALL)


def lora_of(argument: str) -> LoraFile:
    """FILE, FILE:SCALE or PART=FILE:SCALE; raises UserError for a file that does not exist."""
    match = None if Path(argument).is_file() else _WRITTEN.fullmatch(argument)
    part, rest = (match["part"], match["file"]) if match else ("", argument)
    path, colon, scale = rest.rpartition(":")
    try:
        file, factor = (Path(path), float(scale)) if colon else (Path(rest), 1.0)
    except ValueError:  # a colon of the path, as in C:\
        file, factor = Path(rest), 1.0
    if not file.expanduser().is_file() and (words := _behind_a_file(rest)):
        raise UserError(
            f"{lora_option(argument)}: the strength '{words}' is no number; give one such as 0.8, which holds for all "
            f"steps."
        )
    if not file.expanduser().is_file():
        raise UserError(f"{lora_option(argument)}: {file} does not exist; give FILE or FILE:SCALE, or PART=FILE:SCALE.")
    if not math.isfinite(factor):
        raise UserError(
            f"{lora_option(argument)}: the scale {factor} is no number to multiply with; give one such as 0.8."
        )
    return LoraFile(file.expanduser(), factor, part)


def _behind_a_file(text: str) -> str:
    """What is written behind a file and a colon; empty for nothing."""
    places = [i for i, letter in enumerate(text) if letter == ":"]
    return next((text[i + 1 :] for i in places if Path(text[:i]).expanduser().is_file()), "")


def read_loras(files: Sequence[LoraFile], pipeline: type, parts: Parts, words: Mapping[str, str]) -> list[Lora]:
    """Every file for its part of a pipeline of class `pipeline` with these modules.

    `words`: what people call the parts of one architecture, such as the experts of a model that has two; they mean
    nothing where the pipeline has only one of the parts. Raises UserError for a file that is no LoRA or whose part is
    not clear, with the words to write, and CheckpointError for one of another model, listing the keys that match
    nothing.
    """
    experts = dict(words) if set(words.values()) <= parts.keys() else {}
    loras: list[Lora] = []
    unwritten: dict[str, LoraFile] = {}  # expert → the file that was taken for it
    for one in files:
        contents = _placed(one, read_contents(one.file, pipeline, parts), pipeline, parts, experts)
        unmatched, unknown = contents.unmatched(parts), contents.unknown(parts)
        if len(unmatched) == len(unknown) < len(contents) + len(contents.strange):  # the rest is as it should be
            contents = _known_alone(one, contents, unknown)
        else:
            problem = layout_of(unmatched) or f"is for another model: nothing here matches {listed(unmatched) or 'it'}"
            raise CheckpointError(f"{lora_option(one.file)} {problem}.")
        expert = next((p for p in contents.parts() if p in experts.values()), "")
        if expert and not one.part:
            if expert in unwritten:
                raise UserError(
                    f"{lora_option(unwritten[expert].file)} and {lora_option(one.file)} would both go into "
                    f"{expert}; say which expert each is for: {_examples([unwritten[expert].file, one.file], experts)}."
                )
            unwritten[expert] = one
        loras.append(contents.lora(one))
    return loras


def _known_alone(one: LoraFile, contents: Contents, unknown: Sequence[str]) -> Contents:
    """Without what the model has no layer for, which is told."""
    if unknown:
        whole = len(contents) + len(contents.strange)
        log.warning(
            "%s: %d of its %d layers and biases are none of this model's, and are left out: %s.",
            *(lora_option(one.file), len(unknown), whole, listed(unknown)),
        )
    return contents.without(unknown)


def _placed(one: LoraFile, contents: Contents, pipeline: type, parts: Parts, experts: Mapping[str, str]) -> Contents:
    """The contents under the part they are for."""
    words, name = said_by(one.file.name, experts), lora_option(one.file, one.part)
    if one.part:
        part = _part_named(one, pipeline, parts, experts)
        if words and part in experts.values() and part not in {experts[w] for w in words}:
            raise UserError(
                f"{name}: the file's name says {words[0]}, and {one.part} is the other expert; write "
                f"{lora_option(one.file, words[0])}."
            )
        if len(contents.parts()) > 1:
            raise UserError(f"{name} holds layers of {' and '.join(contents.parts())}; leave {one.part}= out.")
        return contents.moved(part)
    if not any(part in experts.values() for part in contents.parts()) or len(contents.parts()) != 1:
        return contents
    fitting = [p for p in dict.fromkeys(experts.values()) if not contents.moved(p).unmatched(parts)]
    if len(fitting) == 1:
        return contents.moved(fitting[0])
    if not fitting:
        return contents  # of another model
    if len(words) != 1:
        raise UserError(
            f"{lora_option(one.file)}: it fits {len(fitting)} experts of {pipeline.__name__}, and its name does not "
            f"say which it is for; write {_examples([one.file, one.file], experts)}, or one of the two."
        )
    return contents.moved(experts[words[0]])


def said_by(name: str, words: Mapping[str, str]) -> list[str]:
    """The words that a file's name holds: high_noise, HighNoise, low_fp16, _low at its end; not high_res, nor flow."""
    ends = r"(?:[-_. ]?(?i:noise|lora|model|expert)(?![a-z])|[-_. ](?i:[a-z]*)\d|$)"
    stem = Path(name).stem
    return [
        word
        for word in words
        if re.search(rf"(?:(?<![A-Za-z])|(?<=[a-z])(?={word[0].upper()}))(?i:{word}){ends}", stem)
    ]


def _part_named(one: LoraFile, pipeline: type, parts: Parts, experts: Mapping[str, str]) -> str:
    part = experts.get(one.part, one.part)
    if part in parts:
        return part
    called = {part: word for word, part in experts.items()}
    there = ", ".join(f"{p} ({called[p]})" if p in called else p for p in sorted(parts))
    raise UserError(f"{lora_option(one.file, one.part)}: {pipeline.__name__} has no part '{one.part}'; it has {there}.")


def _examples(files: Sequence[Path], experts: Mapping[str, str]) -> str:
    """What to write: each file with the word of its name, else the words in their order."""
    rest = [w for w in experts if not any(w in said_by(f.name, experts) for f in files)] or list(experts)
    words = [(said_by(f.name, experts) or [rest[i % len(rest)]])[0] for i, f in enumerate(files)]
    if len(set(words)) < len(files):
        words = list(experts)[: len(files)]
    return option("loras", [f"{word}={file}" for word, file in zip(words, files, strict=True)])
