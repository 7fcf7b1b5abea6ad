"""NVIDIA cards of this machine, as the driver's nvidia-smi lists them; nothing of CUDA is loaded."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from overcrank.errors import TargetError

_FIELDS = ("index", "name", "compute_cap", "memory.total", "memory.free", "driver_version", "uuid")


@dataclass(frozen=True)
class Card:
    index: int
    name: str
    target: str
    """Such as "sm_89"."""
    memory: int
    free: int
    """Bytes."""
    driver: str
    uuid: str = ""
    """By which PyTorch knows it too; its numbers are others than the driver's."""


def installed_cards() -> tuple[Card, ...]:
    """Raises TargetError, saying why, when there is no card or no working driver."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError as error:
        raise TargetError("nvidia-smi is not installed: there is no NVIDIA driver on this machine") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise TargetError(f"nvidia-smi does not answer ({error}): the driver or the card hangs") from error
    if done.returncode or not done.stdout.strip():
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise TargetError(f"nvidia-smi finds no card: {lines[0] if lines else f'exit status {done.returncode}'}")
    return tuple(_card(line) for line in done.stdout.strip().splitlines())


def _card(line: str) -> Card:
    head, capability, total, free, driver, uuid = (part.strip() for part in line.rsplit(",", 5))
    index, _, name = head.partition(",")
    target = "sm_" + capability.replace(".", "")
    return Card(int(index), name.strip(), target, _mebibytes(total), _mebibytes(free), driver, uuid)


def _mebibytes(text: str) -> int:
    """0 where the driver does not tell, as for memory that card and processor share."""
    return int(text) * 2**20 if text.isdigit() else 0
