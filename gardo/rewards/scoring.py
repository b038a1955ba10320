"""Scores images with all rewards of a recipe; each reward is built once and shared by its roles."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gardo.config import RewardsConfig
from gardo.rewards.base import Reward, RewardUnavailable
from gardo.rewards.features import FeatureExtractor
from gardo.rewards.outputs import concatenate, score_batch
from gardo.rewards.registry import build_features, build_reward, feature_names, reward_names
from gardo.types import Prompt, RewardOutput, UserError


class MissingScores(RewardUnavailable):
    """A reward that could not score more samples than ``rewards.max_missing_share`` allows."""


class RewardSet:
    """The proxy, auxiliary and held-out rewards of a run and its feature extractor."""

    def __init__(self, config: RewardsConfig, device: torch.device) -> None:
        self.proxy, self.proxy_weights = config.proxy_name, config.proxy_weights
        self.aux, self.held_out = list(config.aux), list(config.eval)
        self.training_names = [*self.proxy_weights, *self.aux]
        self.all_names = list(dict.fromkeys([*self.training_names, *self.held_out]))
        self.max_missing_share = config.max_missing_share
        self._extractor = [config.features] if config.features else []
        self._check_names("parameters", config.parameters)
        self._check_names("servers", config.servers)
        self._rewards = {name: _build(name, config, device) for name in self.all_names}
        self.features = _build_features(config, device)

    def _check_names(self, key: str, names: Iterable[str]) -> None:
        # a recipe's settings may stay when another reward is chosen, but a typo must not
        extractors = {*feature_names(), *self._extractor} if key == "parameters" else set()
        unknown = set(names) - {*self.all_names, *reward_names()} - extractors
        if unknown:
            raise UserError(
                f"rewards.{key}: '{min(unknown)}' is not among the rewards of this run "
                f"({', '.join(self.all_names)})"
            )

    def __getitem__(self, name: str) -> Reward:
        return self._rewards[name]

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Refuse prompts that a reward of this run cannot judge, before anything is drawn.

        Raises:
            UserError: the first ten such prompts, each with its file and line or its number.
        """
        some = list(prompts)
        texts, metadata = [p.text for p in some], [p.metadata for p in some]
        problems = {name: r.check_prompts(texts, metadata) for name, r in self._rewards.items()}
        refused = []
        for row, prompt in enumerate(some):
            found = [f"{name}: {told[row]}" for name, told in problems.items() if told[row]]
            if found:  # the first reward that refuses it stands for all
                where = prompt.origin or f"prompt {row + 1}"
                refused.append(f"{where} {json.dumps(prompt.text)}: {found[0]}")
        if len(refused) > 10:
            refused[10:] = [f"... and {len(refused) - 10} more"]
        if refused:
            raise UserError("\n".join(refused))

    def score(
        self, names: Sequence[str], images: Tensor, prompts: Sequence[Prompt]
    ) -> dict[str, Tensor]:
        """Score a batch with the named rewards.

        Args:
            names: rewards of this run.
            images: ``[B, 3, H, W]`` float in [0, 1].
            prompts: ``B`` prompts.

        Returns:
            a ``[B]`` float32 tensor per name on the device of ``images``, NaN where a reward could
            not score.
        """
        return {name: self.score_one(name, images, prompts).scores for name in names}

    def score_one(self, name: str, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        """As `score` with a single reward; scores, details and sigma ``[B]`` float32."""
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        output = score_batch(name, self._rewards[name], images, texts, metadata)
        return output.map(lambda values: values.to(images.device))

    def maximised(self, name: str, scores: Tensor) -> Tensor:
        """The scores, negated where lower is better."""
        return scores if self._rewards[name].spec.higher_is_better else -scores

    def proxy_scores(self, scores: Mapping[str, Tensor]) -> Tensor:
        """What is trained on: the weighted sum of the proxy's rewards, each to be maximised.

        Args:
            scores: ``[n]`` per reward, as scored.

        Returns:
            ``[n]``, NaN where one of them is missing.
        """
        parts = [w * self.maximised(name, scores[name]) for name, w in self.proxy_weights.items()]
        return torch.stack(parts).sum(0)

    def proxy_sigma(self, sigmas: Mapping[str, Tensor | None]) -> Tensor:
        """The sigma of `proxy_scores`, of rewards whose errors are independent.

        Args:
            sigmas: ``[n]`` per reward as `ScoreBook.sigma` has them, of all processes; None or no
                entry for a reward that states none.

        Returns:
            ``[n]``, ``sqrt(sum_k (w_k sigma_k)^2)``; NaN where one of them is.

        Raises:
            UserError: a reward of the proxy states no sigma.
        """
        parts = []
        for name, weight in self.proxy_weights.items():
            sigma = sigmas.get(name)
            if sigma is None:
                raise UserError(
                    "algorithm.gate.uncertainty: all but 'ensemble' needs a proxy that reports its "
                    f"uncertainty (RewardOutput.sigma); reward '{name}' reports none"
                )
            parts.append(weight * sigma)
        return torch.stack(parts).square().sum(0).sqrt()

    def check_missing(self, name: str, scores: Tensor) -> None:
        """Refuse to go on when a reward misses too many scores.

        Args:
            name: of the reward.
            scores: ``[n]``, NaN where missing, of all processes.

        Raises:
            MissingScores: more than ``rewards.max_missing_share`` of the scores are missing.
        """
        count = int(scores.isnan().sum())
        share = count / max(len(scores), 1)
        if share > self.max_missing_share:
            raise MissingScores(
                name,
                f"could not score {count} of {len(scores)} images ({share:.1%}); "
                f"rewards.max_missing_share allows {self.max_missing_share:.1%}",
            )


def _build_features(config: RewardsConfig, device: torch.device) -> FeatureExtractor | None:
    if config.features is None:
        return None
    parameters = config.parameters.get(config.features, {})
    try:
        return build_features(config.features, device, **parameters)
    except TypeError as error:
        if not parameters:
            raise
        raise UserError(f"rewards.parameters.{config.features}: {error}") from None


def _build(name: str, config: RewardsConfig, device: torch.device) -> Reward:
    parameters = config.parameters.get(name, {})
    if name in config.servers:
        from gardo.rewards.remote import RemoteReward

        return RemoteReward(name, config.servers[name], config.client, parameters)
    try:
        return build_reward(name, device, **parameters)
    except TypeError as error:
        if not parameters:
            raise
        raise UserError(f"rewards.parameters.{name}: {error}") from None


class ScoreBook:
    """Collects an epoch's scores and features batch by batch, in the order of the samples."""

    def __init__(self) -> None:
        self._outputs: dict[str, list[RewardOutput]] = {}
        self._features: list[Tensor] = []
        self._thumbnails: list[Tensor] = []
        self._seconds: dict[str, float] = {}

    def add(
        self,
        outputs: Mapping[str, RewardOutput | Tensor],
        features: Tensor | None,
        seconds: Mapping[str, float] | None = None,
        thumbnails: Tensor | None = None,
    ) -> None:
        """Append a batch.

        Args:
            outputs: per reward, or its scores ``[B]`` alone.
            features: ``[B, D]``.
            seconds: that the batch took, per reward.
            thumbnails: ``[B, D']`` of `gardo.rewards.thumbnails`.
        """
        for name, found in outputs.items():
            output = RewardOutput(found) if isinstance(found, Tensor) else found
            self._outputs.setdefault(name, []).append(output)
        for name, value in (seconds or {}).items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value
        if features is not None:
            self._features.append(features)
        if thumbnails is not None:
            self._thumbnails.append(thumbnails)

    def scores(self, name: str) -> Tensor:
        """``[n]`` float32."""
        return torch.cat([output.scores for output in self._outputs[name]])

    def details(self) -> dict[str, Tensor]:
        """``[n]`` float32 per ``<reward>/<detail>``, NaN where a batch lacks it."""
        joined = {name: concatenate(outputs) for name, outputs in self._outputs.items()}
        return {f"{name}/{k}": v for name, o in joined.items() for k, v in o.details.items()}

    def sigma(self, name: str) -> Tensor | None:
        """``[n]`` float32, NaN where a batch lacks it; None if the reward never stated any."""
        return concatenate(self._outputs.get(name, [])).sigma

    def features(self) -> Tensor | None:
        """``[n, D]`` float32, or None without a feature extractor."""
        return torch.cat(self._features) if self._features else None

    def thumbnails(self) -> Tensor | None:
        """``[n, D']`` float32, or None where none were kept."""
        return torch.cat(self._thumbnails) if self._thumbnails else None

    def seconds_per_image(self, name: str) -> float | None:
        """What the reward took in this process, or None where it was not timed."""
        count = sum(len(output.scores) for output in self._outputs.get(name, ()))
        return self._seconds[name] / count if name in self._seconds and count else None


def reward_metrics(
    name: str, scores: Tensor, seconds_per_image: float | None = None
) -> dict[str, float]:
    """What an epoch's metrics say of a reward.

    Returns:
        mean and standard deviation over the samples that were scored, the share that was not, and
        ``time/reward/<name>``, the seconds per image, where given.
    """
    valid = scores[~scores.isnan()].double()
    spread = float(valid.std(unbiased=False)) if len(valid) else float("nan")
    metrics = {
        f"reward/{name}/mean": float(valid.mean()) if len(valid) else float("nan"),
        f"reward/{name}/std": spread,
        f"reward/{name}/missing": 1.0 - len(valid) / max(len(scores), 1),
    }
    if seconds_per_image is not None:
        metrics[f"time/reward/{name}"] = seconds_per_image
    return metrics
