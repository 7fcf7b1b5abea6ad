"""What `verify` and `doctor` print."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator

from overcrank import __version__
from overcrank.cli.terminal import SafeConsole
from overcrank.engines.store import Store
from overcrank.runtime.doctor import every_finding
from overcrank.runtime.verify import Check
from overcrank.units import human_bytes


def print_checks(checks: Iterator[Check], tolerance: float) -> bool:
    """Print each check as it ends; returns whether all are within `tolerance`."""
    import onnxruntime as ort

    console = SafeConsole()
    console.print(
        f"graph in ONNX Runtime {ort.__version__} (CPU, 16-bit types widened to fp32) against the eager module in fp32"
    )
    good, rounding = True, 0.0
    for check in checks:
        passed = check.within(tolerance)
        good &= passed
        rounding = max(rounding, check.allowed)
        console.print(
            f"{'ok  ' if passed else 'FAIL'} {check.component:<12} {check.shape!s:<12} "
            f"max error {check.max_error:.2e}, relative {check.relative_error:.2e}  "
            f"({check.note}{f'; {check.quantized} quantized layers' if check.quantized else ''}; {check.seconds:.1f} s)"
        )
    console.print(
        f"{'all within' if good else 'not within'} the tolerance of {tolerance:g} relative"
        f"{f' ({rounding:g} where layers are quantized)' if rounding else ''}"
    )
    return good


def print_doctor(store: Store, quick: bool) -> bool:
    """Print every finding; returns whether none is bad. `quick` leaves the self-test out."""

    console = SafeConsole()
    disk = shutil.disk_usage(next(p for p in (store.root, *store.root.parents) if p.exists()))
    console.print(f"overcrank {__version__}, Python {platform.python_version()}, {platform.platform()}")
    console.print(f"store {store.root}, {human_bytes(disk.free)} free on its disk")
    findings = every_finding(store, quick)
    for finding in findings:
        console.print(f"{finding.verdict:<5}{finding.subject:<18} {finding.text}")
    return all(f.verdict != "bad" for f in findings)
