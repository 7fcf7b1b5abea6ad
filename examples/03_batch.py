"""Render a job file; the same command again renders what is missing."""

import json
import subprocess
import sys
from pathlib import Path

jobs = [
    {"prompt": f"a {colour} {shape} {motion}", "output": f"{colour}-{shape}", "seed": seed}
    for seed, (colour, shape, motion) in enumerate(
        [("red", "circle", "moving right"), ("green", "cross", "rotating"), ("purple", "triangle", "growing")]
    )
]
Path("jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
batch = [sys.executable, "-m", "overcrank", "batch", "jobs.jsonl", "-o", "renders", "--json"]
report = json.loads(subprocess.run(batch, check=True, stdout=subprocess.PIPE).stdout)
for job in report["jobs"]:
    print(job["name"], job["status"], f"{job['seconds']:.1f} s")

sidecar = json.loads(Path("renders/green-cross.json").read_text())
print("rendered again from its sidecar by this line of a job file:", json.dumps(sidecar["request"]))

again = json.loads(subprocess.run(batch, check=True, stdout=subprocess.PIPE).stdout)
print([job["status"] for job in again["jobs"]])
