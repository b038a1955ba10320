"""The embedded model: a real, tiny Stable Diffusion 3 pipeline, a judge and a preference
model, shipped as data.

Importing this package is light (no torch); the work is in its modules.
"""

from __future__ import annotations

from pathlib import Path


def pipeline_path() -> Path:
    """Folder of the shipped ``StableDiffusion3Pipeline``."""
    return Path(__file__).resolve().parent / "pipeline"
