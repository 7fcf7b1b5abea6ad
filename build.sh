#!/usr/bin/env bash
# Sets up a virtual environment in .venv, then does the main job:
#   ./build.sh                                   engines of LTX-Video for an RTX 40 card
#   ./build.sh --model ltx --gpu rtx5090         passes its arguments to build-engine
#   ./build.sh render "a blue square moving up"  renders the demo model (more words go to overcrank render)
#   ./build.sh quick                             runs the tests that build and render nothing
#   ./build.sh test                              runs the tests
#   ./build.sh test-all                          runs them for every network, format and pipeline (over an hour)
#   ./build.sh lint                              ruff and mypy
#   ./build.sh pages                             writes docs/models.md, recipes.md, published.md and the demo's graphs
#   ./build.sh docs                              builds the documentation site: site/index.html
#   ./build.sh bench                             repeats the benchmark of bench/results
#   ./build.sh bench-gpu                         measures everything that only a card can say (bench/bench_gpu.py)
# OVERCRANK_WHEELS=folder installs from wheels in that folder alone, on a machine without a network.
set -euo pipefail
cd "$(dirname "$0")"

VENV=${OVERCRANK_VENV:-.venv}
stamp="$VENV/.installed-$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
  PYTHON=${PYTHON:-python3}
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: overcrank needs Python 3.11 or newer; set PYTHON to one." >&2
    exit 2
  }
  echo "setting up $VENV (once)" >&2
  "$PYTHON" -m venv ${OVERCRANK_WHEELS:+--system-site-packages} "$VENV"
  if [ -n "${OVERCRANK_WHEELS:-}" ]; then
    "$VENV/bin/pip" install --quiet --disable-pip-version-check --no-index --find-links "$OVERCRANK_WHEELS" \
      --no-build-isolation -e . >&2
  else
    "$VENV/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' >&2
  fi
  rm -f "$VENV"/.installed-*
  touch "$stamp"
fi
PATH="$PWD/$VENV/bin:$PATH"
[ "${VENV#/}" = "$VENV" ] || PATH="$VENV/bin:$PATH"

# Neighbours stay in one worker, where they share what their module builds; the first that is done takes of the other's.
workers=(-n "${OVERCRANK_TEST_JOBS:-2}" --dist worksteal)
case "${1:-}" in
  quick) shift; exec python -m pytest "${workers[@]}" -m 'quick and not heavy and not sweep' "$@" ;;
  test) shift; exec python -m pytest "${workers[@]}" "$@" ;;
  test-all) shift; exec python -m pytest "${workers[@]}" -m '' "$@" ;;
  lint)
    ruff check .
    ruff format --check .
    mkdir -p .types && ln -sfn .. .types/overcrank
    exec mypy ;;
  pages)
    python -m overcrank.export.packaged
    overcrank models --markdown docs/models.notes.md --figures bench/results > docs/models.md
    python -m overcrank.cli.recipes > docs/recipes.md
    exec python bench/published.py > docs/published.md ;;
  docs)
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
    echo "the site: $PWD/site/index.html" >&2 ;;
  bench-gpu) shift; exec python bench/bench_gpu.py "$@" ;;
  bench) shift; exec python bench/build_ltx.py "$@" ;;
  render)
    shift
    [ $# -gt 0 ] || { echo 'usage: ./build.sh render "a blue square moving up" [overcrank render options]' >&2; exit 2; }
    prompt=$1; shift
    exec overcrank render --prompt "$prompt" "$@" ;;
  "") exec build-engine --model ltx --gpu sm_89 ;;
  *) exec build-engine "$@" ;;
esac
