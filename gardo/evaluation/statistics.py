"""Means, win rates and their intervals by a bootstrap over prompts.

Images of one prompt resemble each other, so prompts are what is drawn again, each with all its
images (cluster bootstrap; Davison and Hinkley, Bootstrap Methods and their Application, 1997,
section 3.8). All statistics of an evaluation use the same draws: what one prompt does to two of
them it does in the same resample, and differences have the right spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gardo.evaluation.metrics import mean_pairwise_distance

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval.

    Attributes:
        value: NaN where there is nothing to average.
        low, high: ends of the interval; NaN where prompts cannot be drawn again, because there is
            but one.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampled:
    """A statistic and what it is on each resample of the prompts; can be subtracted."""

    value: float
    replicates: Array

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.value - other.value, self.replicates - other.replicates)

    def interval(self, confidence: float = 0.95) -> Estimate:
        """Percentile interval; resamples without a value are left out."""
        usable = self.replicates[np.isfinite(self.replicates)]
        if not len(usable) or not math.isfinite(self.value):
            return Estimate(self.value, math.nan, math.nan)
        tail = (1 - confidence) / 2
        low, high = np.quantile(usable, [tail, 1 - tail])
        return Estimate(self.value, float(low), float(high))


class PromptBootstrap:
    """Draws the prompts again, with replacement, the same draws for every statistic."""

    def __init__(self, prompts: int, resamples: int = 2000, seed: int = 0) -> None:
        """``prompts`` is their number; equal arguments give equal draws."""
        if prompts < 1 or resamples < 1:
            raise ValueError(f"prompts, resamples: expected >= 1, got {prompts}, {resamples}")
        source = np.random.Generator(np.random.PCG64(seed))
        share = np.full(prompts, 1 / prompts)
        # how often each prompt is drawn, [resamples, prompts]
        self.counts = source.multinomial(prompts, share, size=resamples).astype(np.uint16)

    def mean(self, values: Array) -> Resampled:
        """Mean over images, ``[prompts]`` or ``[prompts, images]``; NaN marks a missing one."""
        values = np.asarray(values, dtype=np.float64).reshape(self.counts.shape[1], -1)
        there = np.isfinite(values)
        sums, sizes = np.where(there, values, 0.0).sum(1), there.sum(1).astype(np.float64)
        if not sizes.sum():
            return Resampled(math.nan, np.full(len(self.counts), math.nan))
        value = float(sums.sum() / sizes.sum())
        if self.counts.shape[1] == 1:
            return Resampled(value, np.full(len(self.counts), math.nan))
        replicates = np.empty(len(self.counts))
        for start in range(0, len(self.counts), 256):  # wide tables need no float copy at once
            counts = self.counts[start : start + 256].astype(np.float64)
            drawn, total = counts @ sizes, counts @ sums
            replicates[start : start + 256] = np.divide(
                total, drawn, out=np.full(len(counts), math.nan), where=drawn > 0
            )
        return Resampled(value, replicates)


def average(parts: Sequence[Resampled]) -> Resampled:
    """The mean of some statistics, at least one."""
    return Resampled(
        float(np.mean([p.value for p in parts])), np.mean([p.replicates for p in parts], axis=0)
    )


def wins(scores: Array, base: Array) -> Array:
    """Who wins, image by image of the same prompt and seed.

    Args:
        scores, base: the same shape, higher is better, NaN where missing.

    Returns:
        1 for a win, 0.5 for a tie, 0 for a loss, NaN where either is missing.
    """
    outcome = np.where(scores > base, 1.0, np.where(scores == base, 0.5, 0.0))
    return np.where(np.isfinite(scores) & np.isfinite(base), outcome, math.nan)


def group_diversity(features: Tensor) -> Array:
    """Diversity of each prompt's images, `mean_pairwise_distance` of one group at a time.

    Args:
        features: ``[prompts, images, D]``; rows that are not finite are left out.

    Returns:
        ``[prompts]``, NaN where a prompt has fewer than two images.
    """
    groups = [
        float(mean_pairwise_distance(rows, torch.zeros(len(rows), dtype=torch.int64)))
        for rows in features
    ]
    return np.array(groups, dtype=np.float64)


def hacking_gap(proxy: Resampled, held_out: Sequence[Resampled]) -> Resampled:
    """Win rate under the proxy less the mean win rate under the held-out rewards, in [-1, 1].

    Win rates have no unit, so that rewards of any scale can be compared: it is the method's own
    uncertainty, taken against the base instead of within a batch. About 0: what the proxy saw
    improve, the others saw, too. Large: the proxy saw more of it than they did: hacking where they
    lose, a finer proxy where they tie.
    """
    return proxy - average(held_out)
