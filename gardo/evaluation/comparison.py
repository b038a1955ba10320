"""What the tables say of every contender: rewards, win rates, gap, diversity, KL, as estimates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gardo.evaluation.cache import FORMAT
from gardo.evaluation.drawing import Draw
from gardo.evaluation.judging import Judge
from gardo.evaluation.request import BASE
from gardo.evaluation.settings import HELD_OUT, Contender
from gardo.evaluation.statistics import (
    Array,
    Estimate,
    PromptBootstrap,
    Resampled,
    group_diversity,
    hacking_gap,
    wins,
)
from gardo.evaluation.workflow import Collected, Evaluation
from gardo.rewards.scoring import RewardSet
from gardo.rng import derive_seed
from gardo.run.folder import package_versions

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Column:
    """What is found about one contender.

    Attributes:
        rewards: mean score per reward.
        missing: number of images that a reward could not score.
        win_rates: against the base, per reward; ``proxy`` is the weighted sum, where there is one.
        gap: win rate under the proxy less that under the held-out rewards.
        diversity: mean pairwise cosine distance within a prompt, times 100.
        kl: to the base.
    """

    contender: Contender
    rewards: Mapping[str, Estimate]
    missing: Mapping[str, int]
    win_rates: Mapping[str, Estimate]
    gap: Estimate | None
    diversity: Estimate | None
    kl: Estimate | None


@dataclass(frozen=True)
class Cell:
    """One image.

    Attributes:
        file: its PNG.
        scores: as scored; NaN where missing.
        kl: of the contender's trajectory of this prompt and seed, where it was measured.
    """

    file: Path
    scores: Mapping[str, float]
    kl: float | None


@dataclass(frozen=True)
class Row:
    """The images of one prompt and seed, a cell per contender."""

    prompt: str
    seed: int
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Comparison:
    """All results of an evaluation.

    Attributes:
        columns: the contenders, the base first.
        roles: proxy, auxiliary or held out, per reward.
        higher_is_better: per reward.
        settings: how the images and numbers were made, in words.
        rows: first all prompts of the first seed.
    """

    columns: Sequence[Column]
    roles: Mapping[str, str]
    higher_is_better: Mapping[str, bool]
    settings: Mapping[str, Any]
    notes: Sequence[str]
    rows: Sequence[Row]

    @property
    def has_base(self) -> bool:
        """Whether the first column is the reference."""
        return self.columns[0].contender.name == BASE


def compare(evaluation: Evaluation, collected: Collected) -> Comparison:
    """Turn scores, features and KLs into estimates; all intervals share one bootstrap."""
    settings, rewards = evaluation.settings, evaluation.rewards
    judge = Judge(rewards, settings, evaluation.cache, False, evaluation.device)
    bootstrap = PromptBootstrap(
        len(settings.prompts), evaluation.request.resamples, derive_seed(0, "bootstrap")
    )
    scores = {
        name: {reward: judge.scores(reward, records) for reward in settings.roles}
        for name, records in collected.images.items()
    }
    base = scores[BASE] if settings.with_base else None
    columns = []
    for contender in settings.contenders:
        mine, records = scores[contender.name], collected.images[contender.name]
        features = judge.features(records)
        is_base = base is None or contender.name == BASE
        won = {} if is_base or base is None else _wins(contender, mine, base, rewards)
        rates = {name: bootstrap.mean(outcome) for name, outcome in won.items()}
        columns.append(
            Column(
                contender=contender,
                rewards={n: _interval(bootstrap.mean(values)) for n, values in mine.items()},
                missing={n: int(np.isnan(values).sum()) for n, values in mine.items()},
                win_rates={name: _interval(rate) for name, rate in rates.items()},
                gap=_gap(contender, rates, settings.roles),
                diversity=None
                if features is None
                else _interval(bootstrap.mean(group_diversity(features))),
                kl=_kl(bootstrap, collected.kl[contender.name], len(settings.prompts)),
            )
        )
    return Comparison(
        columns=columns,
        roles=settings.roles,
        higher_is_better={n: rewards[n].spec.higher_is_better for n in settings.roles},
        settings=describe(evaluation),
        notes=settings.notes,
        rows=_rows(evaluation, collected, judge),
    )


def _wins(
    contender: Contender,
    mine: Mapping[str, Array],
    base: Mapping[str, Array],
    rewards: RewardSet,
) -> dict[str, Array]:
    """Wins against the base per reward; ``proxy`` stands for what the contender was trained on."""

    def maximised(name: str, scores: Mapping[str, Array]) -> Array:
        return rewards.maximised(name, torch.from_numpy(scores[name])).numpy()

    def trained_on(scores: Mapping[str, Array]) -> Array:
        parts = [weight * maximised(name, scores) for name, weight in contender.proxy.items()]
        return np.sum(parts, axis=0)

    won = {name: wins(maximised(name, mine), maximised(name, base)) for name in mine}
    if contender.proxy:
        won["proxy"] = wins(trained_on(mine), trained_on(base))
    return won


def _gap(
    contender: Contender, rates: Mapping[str, Resampled], roles: Mapping[str, str]
) -> Estimate | None:
    held_out = [
        rate
        for name, rate in rates.items()
        if roles.get(name) == HELD_OUT and math.isfinite(rate.value)
    ]
    if not contender.proxy or not held_out or "proxy" not in rates:
        return None
    return _interval(hacking_gap(rates["proxy"], held_out))


def _kl(
    bootstrap: PromptBootstrap, measured: Mapping[Draw, float], prompts: int
) -> Estimate | None:
    if not measured:
        return None
    values = np.full((prompts, 1 + max(draw.seed for draw in measured)), math.nan)
    for draw, value in measured.items():
        values[draw] = value
    return _interval(bootstrap.mean(values))


def _interval(statistic: Resampled) -> Estimate:
    return statistic.interval(CONFIDENCE)


def _rows(evaluation: Evaluation, collected: Collected, judge: Judge) -> list[Row]:
    settings = evaluation.settings
    rows = []
    for draw in evaluation.draws:
        cells = []
        for contender in settings.contenders:
            record = collected.images[contender.name][draw]
            cells.append(
                Cell(
                    file=evaluation.cache.path(record.name, ".png"),
                    scores={name: judge.found(name, draw, record) for name in settings.roles},
                    kl=collected.kl[contender.name].get(draw),
                )
            )
        rows.append(Row(settings.prompts[draw.prompt].text, settings.seeds[draw.seed], cells))
    return rows


def describe(evaluation: Evaluation) -> dict[str, Any]:
    """How images and numbers were made: what belongs beside every table."""
    settings, config = evaluation.settings, evaluation.settings.config
    sampling = config.sampling
    described: dict[str, Any] = {
        "format": FORMAT,
        "base": None if settings.base is None else settings.base.path,
        "prompts": len(settings.prompts),
        "seeds": list(settings.seeds),
        "sampler": f"{settings.steps} Euler steps without noise",
        "guidance_scale": settings.guidance,
        "resolution": sampling.resolution or "the model's own",
        "precision": config.precision,
        "device": evaluation.device.type,
        "features": settings.rewards.features,
        "bootstrap": f"{evaluation.request.resamples} resamples of prompts, "
        f"{CONFIDENCE:.0%} percentile intervals",
        "versions": package_versions(),
    }
    if settings.kl_seeds:
        described["kl"] = (
            f"{sampling.num_steps} {sampling.sde} steps, noise level {sampling.noise_level:g}, "
            f"{settings.kl_seeds} seed{'s' if settings.kl_seeds > 1 else ''} per prompt"
        )
    return described
