"""Peak memory of `overcrank pack` against the size of the checkpoint.

    python bench/pack_memory.py [BLOCKS …]

Checkpoints of LTX-Video 2B's width with so many blocks (28 is the published depth), random, bf16, in files of 2 GB, are
packed in fp8 by the public command, each in a process of its own; memory is the peak of that process (VmHWM), pages of
mapped files included. The graph is exported first, so that packing alone is measured. Results are written to
bench/results/pack-memory.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "pack-memory.json"
PACK = [sys.executable, "-c", "from overcrank.cli import main; main()", "pack", "--precision", "fp8", "--quiet"]
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""
SHARD = 2_000_000_000


def checkpoint(folder: Path, blocks: int) -> int:
    """A diffusers folder with a transformer of `blocks` blocks; returns the bytes of its weights."""
    import torch
    from overcrank.export.module import abstract_module
    from overcrank.models import components, resolve
    from safetensors.torch import save_file

    variant = resolve("ltx")
    configs = {**variant.configs, "transformer": {**variant.configs["transformer"], "num_layers": blocks}}
    (component,) = components(replace(variant, configs=configs), ("denoiser",))
    for name, config in configs.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    kinds = {"transformer": component.cls, "vae": "AutoencoderKLLTXVideo"}
    index = {"_class_name": "LTXPipeline", **{n: ["diffusers", cls] for n, cls in kinds.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, Any] = {}
    places: dict[str, str] = {}
    size = total = number = 0

    def flush() -> None:
        nonlocal size, number
        name = f"diffusion_pytorch_model-{number:05}.safetensors"
        save_file(shard, folder / "transformer" / name)
        places.update(dict.fromkeys(shard, name))
        shard.clear()
        size, number = 0, number + 1

    for name, parameter in abstract_module(component, component.config, "bf16").named_parameters():
        shard[name] = torch.randn(parameter.shape, generator=generator, dtype=torch.bfloat16) * 0.02
        size += shard[name].nbytes
        total += shard[name].nbytes
        if size > SHARD:
            flush()
    flush()
    whole = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(whole))
    return total


def measured(blocks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="overcrank-bench-") as name:
        root = Path(name)
        size = checkpoint(root / "model", blocks)
        command = [
            *PACK,
            "--model",
            str(root / "model"),
            "--store",
            str(root / "store"),
            "-o",
            str(root / "p.safetensors"),
        ]
        subprocess.run(command, check=True)  # exports the graph
        done = subprocess.run([sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, check=True)
        said, peak = done.stdout.strip().splitlines()
        return {
            "blocks": blocks,
            "checkpoint_gb": round(size / 1e9, 2),
            "pack_gb": round((root / "p.safetensors").stat().st_size / 1e9, 2),
            "peak_ram_gb": round(int(peak) / 1e9, 3),
            "said": said.rpartition("  ")[2],
            "date": datetime.now(UTC).date().isoformat(),
        }


def main() -> None:
    rows = [measured(int(blocks)) for blocks in sys.argv[1:] or ("12", "44")]
    for row in rows:
        print(json.dumps(row))
    slope = (rows[-1]["peak_ram_gb"] - rows[0]["peak_ram_gb"]) / (rows[-1]["checkpoint_gb"] - rows[0]["checkpoint_gb"])
    table = {"command": "python bench/pack_memory.py", "rows": rows, "ram_per_checkpoint_gb": round(slope, 4)}
    RESULTS.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    print(f"{slope:.4f} GB of RAM more for a GB of checkpoint")


if __name__ == "__main__":
    main()
