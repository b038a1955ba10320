"""What the command line of ``python -m gardo.evaluate`` asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gardo.types import UserError

BASE = "base"
"""Name of the reference in tables."""
MAX_SEEDS = 10_000


@dataclass(frozen=True)
class Request:
    """Options of an evaluation; None means what the first run's configuration says.

    Attributes:
        runs: run folders, LoRA exports, pipeline folders, hub ids or ``builtin:tiny``.
        names: what the tables call them; None: the names of their folders.
        base: the base model's folder or hub id.
        with_base: whether the base model is a contender, and with it what is compared to it.
        recipe: settings, in place of the first run's.
        prompts: prompt file, or folder of them by split.
        seeds: of the initial noise.
        rewards: held-out rewards.
        features: extractor for diversity; ``none`` for no diversity.
        kl_seeds: how many of the seeds the KL is measured on; 0: no KL.
        resamples: of the bootstrap.
        out: folder of the tables.
        cache: folder of images and scores; None: in ``out``.
        rescore: whether scores in the cache are made anew.
        rows: most rows of images in the HTML file.
    """

    runs: Sequence[str]
    names: Sequence[str] | None = None
    base: str | None = None
    with_base: bool = True
    recipe: str | None = None
    prompts: Path | None = None
    split: str | None = None
    max_prompts: int | None = None
    seeds: Sequence[int] | None = None
    rewards: Sequence[str] | None = None
    features: str | None = None
    steps: int | None = None
    guidance: float | None = None
    resolution: int | None = None
    precision: str | None = None
    batch_size: int | None = None
    device: str | None = None
    kl_seeds: int = 1
    resamples: int = 2000
    out: Path = Path("evaluation")
    cache: Path | None = None
    rescore: bool = False
    rows: int = 80


def parse_seeds(words: Sequence[str]) -> list[int]:
    """Read seeds as ``0 1 2``, ``0,1,2``, ``0-7`` or a mixture.

    Raises:
        UserError: a word that is neither a number nor a range, a range that runs backwards, a seed
            given twice, or more than `MAX_SEEDS`.
    """
    seeds: list[int] = []
    for word in (part for text in words for part in text.split(",")):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", word.strip(), re.ASCII)
        if match is None:
            raise UserError(
                f"--seeds: expected whole numbers or ranges such as 0 1 2 or 0-7, got '{word}'"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"--seeds: expected a range from low to high, got '{word}'")
        if last - first + len(seeds) >= MAX_SEEDS:
            raise UserError(f"--seeds: expected at most {MAX_SEEDS} seeds, got more with '{word}'")
        seeds += range(first, last + 1)
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1}) if len(seeds) < 1000 else []
    if twice or len(set(seeds)) < len(seeds):
        which = f", got {twice[0]} twice" if twice else ""
        raise UserError(f"--seeds: expected different seeds{which}")
    return seeds


def split_names(words: Sequence[str]) -> list[str]:
    """Reward names as ``a b`` or ``a,b``, each once."""
    names = [name.strip() for word in words for name in word.split(",")]
    return list(dict.fromkeys(name for name in names if name))
