"""What the fixtures of the tiny pipeline and the tests that use them share."""

from __future__ import annotations

from pathlib import Path

from tools.tiny import models

PROMPTS = ("three red circles", "two blue squares")


def save_pipeline(family: str, folder: Path) -> None:
    """Save a random pipeline of a family, made by ``tools.tiny.models.build_<family>_pipeline``."""
    getattr(models, f"build_{family}_pipeline")(seed=0).save_pretrained(folder)
