"""From scores to advantages and the gate, over the samples of all processes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.config import AlgorithmConfig
from gardo.distributed.process import Runtime
from gardo.rewards.scoring import RewardSet, ScoreBook, reward_metrics
from gardo.rewards.thumbnails import image_variance
from gardo.sampling.plan import EpochPlan


@dataclass(frozen=True)
class ShapedEpoch:
    """What training needs to know of this process's samples.

    Attributes:
        advantage: ``[n]`` float32.
        gate: ``[n]`` bool, the samples that carry the KL penalty.
        gated_rows: the rows where ``gate`` holds, on the host.
        gated_per_update: gated samples per update over all processes.
        metrics: figures of the epoch over all processes.
        mode: how the gate was drawn: paper, official, all or off.
        scores: ``[1 + K, N]`` of the samples of all processes: the proxy, then the auxiliary
            rewards, larger is better; None where nobody asks for them.
    """

    advantage: Tensor
    gate: Tensor
    gated_rows: tuple[int, ...]
    gated_per_update: tuple[int, ...]
    metrics: dict[str, float]
    mode: str = "paper"
    scores: Tensor | None = None


class Shaper:
    """GARDO's reward shaping (arXiv 2512.24138) with its adaptive gate fraction."""

    def __init__(self, config: AlgorithmConfig, rewards: RewardSet) -> None:
        self.config = config
        self.rewards = rewards
        # without a KL term there is nothing to gate
        self.gate_mode = config.gate.mode if config.has_kl else "off"
        fraction, gates = config.gate.fraction, self.gate_mode in ("paper", "official")
        self.fraction = (
            gk.AdaptiveFraction(fraction)
            if config.gate.adaptive and gates
            else gk.AdaptiveFraction(fraction, low=fraction, high=fraction)
        )

    def __call__(self, book: ScoreBook, plan: EpochPlan, runtime: Runtime) -> ShapedEpoch:
        total = sum(plan.update_sizes)
        metrics: dict[str, float] = {}
        scores: dict[str, Tensor] = {}
        for name in self.rewards.training_names:
            scores[name] = runtime.gather(book.scores(name), plan.sample_ids, total).double()
            self.rewards.check_missing(name, scores[name])
            metrics |= reward_metrics(name, scores[name], book.seconds_per_image(name))
        details = book.details()
        for name in runtime.union(details):
            mine = details.get(name, torch.full(plan.sample_ids.shape, torch.nan))
            rows = runtime.gather(mine.to(runtime.device), plan.sample_ids, total)
            metrics[f"reward/{name}/mean"] = float(rows.double().nanmean())
        proxy = self.rewards.proxy_scores(scores)
        if self.rewards.proxy not in scores:
            metrics |= reward_metrics(self.rewards.proxy, proxy)
        aux = [self.rewards.maximised(name, scores[name]) for name in self.rewards.aux]
        rewards = torch.stack([proxy, *aux])
        group_ids = torch.arange(total, device=proxy.device) % plan.prompts

        distance = None
        features = book.features()
        if features is not None:
            gathered = runtime.gather(features, plan.sample_ids, total)
            distance = gk.nearest_neighbor_distance(gathered, group_ids)
            # a sample without an image has no distance
            metrics["diversity/nn_distance"] = float(distance.nanmean())
        small = book.thumbnails()
        if small is not None:
            gathered = runtime.gather(small, plan.sample_ids, total)
            metrics["diversity/image_variance"] = float(image_variance(gathered, group_ids))

        # a sample that lacks a score, or its distance where that counts, takes no part
        valid = rewards.isfinite().all(0)
        factor = distance.double() if self.config.diversity and distance is not None else None
        if factor is not None:
            valid &= factor.isfinite()
        rated = torch.where(valid, proxy, torch.nan)
        advantage = gk.group_advantages(
            rated, group_ids, factor, norm=self.config.advantage_norm
        ).float()
        gate, gate_metrics = self._gate(rated, rewards[1:], group_ids, valid)
        starts = accumulate(plan.update_sizes, initial=0)
        mine = plan.sample_ids.to(gate.device)
        own = gate[mine]
        return ShapedEpoch(
            advantage=advantage[mine],
            gate=own,
            gated_rows=tuple(own.nonzero().flatten().tolist()),
            gated_per_update=tuple(int(gate[a:b].sum()) for a, b in pairwise(starts)),
            metrics=metrics | gate_metrics,
            mode=self.gate_mode,
            scores=rewards,
        )

    def _gate(
        self, proxy: Tensor, aux: Tensor, group_ids: Tensor, valid: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The gate, bool ``[N]``, and its figures."""
        config, official = self.config.gate, self.gate_mode == "official"
        drawn = gk.gate_samples(
            proxy,
            aux,
            group_ids,
            self.fraction,
            side="under" if official else "over",
            ties=self.config.gate_ties,
            share_of=config.share_of,
            scope=config.scope,
        )
        gate = {"all": valid, "off": torch.zeros_like(valid)}.get(self.gate_mode, drawn.gate)
        return gate, {
            "gate/fraction": self.fraction.fraction,
            "gate/share": float(gate.double().mean()),
            # by group, if each has its own
            "gate/threshold": float(drawn.threshold.mean()),
            "uncertainty/mean": float(drawn.mean_uncertainty),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.fraction.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fraction.load_state_dict(state)
