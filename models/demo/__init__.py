"""ltx-demo: a tiny trained LTX-Video checkpoint that ships with the package.

`captions.py` has the words, `clips.py` draws the training videos, `train.py` trains the VAE, the text encoder and the
denoiser on them, `judge.py` measures what the result renders.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "ltx-demo"
