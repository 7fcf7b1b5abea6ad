"""Loaded before anything that counts the cores: libraries read this when they are loaded."""

import os

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Each worker, and what it starts, computes on its share of the cores: those that take all of them wait for each
    # other's threads, which spin.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
