"""Scores images with all rewards of a recipe; each reward is built once and shared by its roles."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gardo.config import RewardsConfig
from gardo.rewards.base import Reward, build_reward, reward_names
from gardo.rewards.features import FeatureExtractor, build_features
from gardo.types import Prompt, UserError


class RewardSet:
    """The proxy, auxiliary and held-out rewards of a run and its feature extractor."""

    def __init__(self, config: RewardsConfig, device: torch.device) -> None:
        self.proxy, self.aux, self.held_out = config.proxy, list(config.aux), list(config.eval)
        self.training_names = [self.proxy, *self.aux]
        self.all_names = list(dict.fromkeys([*self.training_names, *self.held_out]))
        self._rewards: dict[str, Reward] = {}
        for name in self.all_names:
            parameters = config.parameters.get(name, {})
            try:
                self._rewards[name] = build_reward(name, device, **parameters)
            except TypeError as error:
                if not parameters:
                    raise
                raise UserError(f"rewards.parameters.{name}: {error}") from None
        # a recipe's parameters may stay when another reward is chosen, but a typo must not
        unknown = config.parameters.keys() - {*self.all_names, *reward_names()}
        if unknown:
            raise UserError(
                f"rewards.parameters: '{min(unknown)}' is not among the rewards of this run "
                f"({', '.join(self.all_names)})"
            )
        self.features: FeatureExtractor | None = (
            build_features(config.features, device) if config.features else None
        )

    def __getitem__(self, name: str) -> Reward:
        return self._rewards[name]

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Refuse prompts that a reward of this run cannot judge, before anything is drawn."""
        for number, prompt in enumerate(prompts, start=1):
            for name, reward in self._rewards.items():
                problem = reward.check_prompt(prompt.text, prompt.metadata)
                if problem:
                    raise UserError(f"prompt {number} {json.dumps(prompt.text)}: {name}: {problem}")

    @torch.inference_mode()
    def score(
        self, names: Sequence[str], images: Tensor, prompts: Sequence[Prompt]
    ) -> dict[str, Tensor]:
        """Score a batch with the named rewards.

        Returns:
            a ``[B]`` float32 tensor per name, NaN where a reward could not score.
        """
        return {name: self._score_one(name, images, prompts) for name in names}

    def _score_one(self, name: str, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        reward = self._rewards[name]
        size = reward.spec.batch_size or len(images)
        parts = []
        for start in range(0, len(images), size):
            some = prompts[start : start + size]
            scores: Any = reward.score(
                images[start : start + size], [p.text for p in some], [p.metadata for p in some]
            ).scores
            if not isinstance(scores, Tensor) or scores.shape != (len(some),):
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise UserError(f"reward '{name}': expected scores [{len(some)}], got {got}")
            parts.append(scores.to(images.device, torch.float32))
        return torch.cat(parts) if parts else images.new_zeros(0)

    def maximised(self, name: str, scores: Tensor) -> Tensor:
        """The scores, negated where lower is better."""
        return scores if self._rewards[name].spec.higher_is_better else -scores


class ScoreBook:
    """Collects an epoch's scores and features batch by batch, in the order of the samples."""

    def __init__(self) -> None:
        self._scores: dict[str, list[Tensor]] = {}
        self._features: list[Tensor] = []

    def add(self, scores: Mapping[str, Tensor], features: Tensor | None) -> None:
        for name, values in scores.items():
            self._scores.setdefault(name, []).append(values)
        if features is not None:
            self._features.append(features)

    def scores(self, name: str) -> Tensor:
        """``[n]`` float32."""
        return torch.cat(self._scores[name])

    def features(self) -> Tensor | None:
        """``[n, D]`` float32, or None without a feature extractor."""
        return torch.cat(self._features) if self._features else None


def reward_metrics(name: str, scores: Tensor) -> dict[str, float]:
    """Mean and standard deviation over the samples that were scored, and the share that was not."""
    valid = scores[~scores.isnan()].double()
    spread = float(valid.std(unbiased=False)) if len(valid) else float("nan")
    return {
        f"reward/{name}/mean": float(valid.mean()) if len(valid) else float("nan"),
        f"reward/{name}/std": spread,
        f"reward/{name}/missing": 1.0 - len(valid) / max(len(scores), 1),
    }
