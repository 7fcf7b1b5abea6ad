"""What the command line does, in Python: `overcrank.build` is `overcrank build`, and so on, with the same options.

`load` and `accelerate`, which give pipelines, are in runtime/pipeline; `calibrate` is in calibration/run.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.engines import download, remote
from overcrank.engines.build import Built, Progress
from overcrank.engines.build import build as build_requests
from overcrank.engines.lint import lint_bundle
from overcrank.engines.place import Remote
from overcrank.engines.plan import PlanReport
from overcrank.engines.request import BuildOptions, request_notes, requests_for
from overcrank.engines.store import Store
from overcrank.engines.targets import precision_for, targets_for
from overcrank.engines.trust import Keyring
from overcrank.engines.workers import LocalWorkers
from overcrank.errors import StoreError, UserError
from overcrank.models import hub_folder, local_folder, resolve
from overcrank.models.hub import Watch, progress_bar
from overcrank.options import merged, option
from overcrank.runtime.pipeline.naming import layout_words

if TYPE_CHECKING:
    from overcrank.runtime.verify import Check

log = logging.getLogger("overcrank")
Place = Store | Path | str | None
"""A store, or its folder [default: $OVERCRANK_HOME, else the user's cache]."""
Transfer = Callable[[str, int, int], None]
"""Called with a file's name, how many of its bytes were transferred, and how many it has."""


def build(
    model: str,
    gpu: str | Sequence[str],
    options: BuildOptions | None = None,
    *,
    store: Place = None,
    progress: Progress = lambda title, doing: None,
    watch: Watch = progress_bar,
    **changes: Any,
) -> list[Built]:
    """Build TensorRT engines of a model, one bundle for each card; no GPU is needed, nor weights.

    `model`: family, variant, diffusers folder or hub id. `gpu`: "sm_89", a card ("RTX 4070"), "rtx" (one portable
    engine for RTX 30, 40 and 50), "all", or "auto"; or several of them. `changes`: fields of BuildOptions, over those
    of `options`, such as precision="fp8". `progress` is called with a job's title and what it does; `watch` shows a
    download, which embedded weights may need. What the store holds already is not built again (`Built.cached`).

    In a script, call this under `if __name__ == "__main__":`, for it starts processes. Raises UserError for what
    cannot be built, ExportError and CompileError where it fails.
    """
    options = merged(BuildOptions, options, changes)
    if options.layout:
        options = replace(options, layout=layout_words(model, options.layout))
    where, variant = Store(store), resolve(model)
    checkpoint = None
    if options.embed_weights:
        checkpoint = local_folder(model) or hub_folder(variant, home=where.root, watch=watch)
    requests = requests_for(variant, [gpu] if isinstance(gpu, str) else gpu, options, checkpoint)
    for note in request_notes(requests):
        log.warning("note: %s", note)
    return build_requests(requests, where, progress, partial(LocalWorkers, options.jobs))


def verify(
    bundle: Path | str,
    checkpoint: Path | None = None,
    *,
    weights: Sequence[str] | Mapping[str, str | Path] = (),
    comfy: Path | None = None,
    store: Place = None,
) -> list[Check]:
    """Run a bundle's graphs in ONNX Runtime against the eager modules, on this machine's processor.

    `bundle`: its path, or name in the store. `checkpoint`: a diffusers folder, `weights` and `comfy`: as for `load`
    [default: random weights]. Each Check tells the largest error, also relative to the largest value;
    `check.within(1e-4)` allows for quantized layers' rounding. Raises IntegrityError if a file of the bundle does not
    match its manifest, UserError for a file that is not the part's.
    """
    from overcrank.runtime.verify import Weights, verify_bundle

    return list(verify_bundle(Store(store).resolve(str(bundle)), Weights(checkpoint, weights, comfy)))


def plan_report(bundle: Path | str, *, store: Place = None) -> dict[str, PlanReport]:
    """What each of a bundle's engines does, by component: kernels, GEMM epilogues, work on weights at run time."""
    return dict(lint_bundle(Store(store).resolve(str(bundle))))


def push(
    url: str,
    bundles: Sequence[Path | str] | None,
    key: str,
    *,
    store: Place = None,
    progress: Transfer = lambda name, done, size: None,
) -> list[remote.Listed]:
    """Sign bundles and publish them at `url`: a folder, s3://, gs://, hf:// or what else fsspec writes to.

    `bundles`: their paths or names in the store; None for every one there. `key`: name of a key of one's own
    (overcrank keys new). Raises IntegrityError for a bundle whose files are not
    what its manifest says, StoreError where `url` cannot be written.
    """
    where = Store(store)
    if bundles is None:
        bundles = [path for path, _ in where.list()]
        if not bundles:
            raise StoreError(f"There are no bundles in {where.bundles} to push.")
    paths = [where.resolve(str(bundle)) for bundle in bundles]
    return remote.push(Remote(url), paths, key, Keyring(), progress)


@dataclass(frozen=True)
class PullOptions:
    """Which bundle is fetched; as the options of `overcrank engines pull`."""

    gpu: str = "auto"
    """"auto" for the card in this machine, or one by name."""
    precision: str = "auto"
    """auto, fp16, bf16, fp8, int8 or nvfp4."""
    allow_unsigned: bool = False
    """Also what nobody trusted has signed: you vouch for the place."""
    follow: bool = False
    """Also where the place redirects to another host."""


def pull(
    url: str,
    model: str,
    options: PullOptions | None = None,
    *,
    store: Place = None,
    progress: Transfer = lambda name, done, size: None,
    **changes: Any,
) -> Path:
    """Fetch the bundle that serves a card from `url` into the store, checked and signed by someone trusted.

    `changes`: fields of PullOptions, over those of `options`. Raises UserError where nothing there serves, with the
    nearest there is, and IntegrityError for anything that is off.
    """
    options = merged(PullOptions, options, changes)
    where, ring, place = Store(store), Keyring(), Remote(url, options.follow)
    targets = targets_for([options.gpu], "tensorrt_rtx")
    if len(targets) > 1:
        names = ", ".join(t.name for t in targets)
        raise UserError(
            f"{option('gpu', options.gpu)} stands for {len(targets)} cards ({names}); a pull is for one of them."
        )
    target = targets[0]
    index = remote.read_index(place, ring, options.allow_unsigned)
    listed = remote.fitting(index, model, target.name, precision_for(target, options.precision))
    return download.pull(place, listed, where, ring, progress, options.allow_unsigned)


def search(url: str, model: str = "", *, follow: bool = False) -> list[remote.Listed]:
    """What is published at `url`, of one model or of all; the index must be signed by someone trusted."""
    index = remote.read_index(Remote(url, follow), Keyring())
    names = remote.published_names(model) if model else None
    return [listed for listed in index.bundles.values() if names is None or listed.model in names]
