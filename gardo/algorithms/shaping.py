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
        self.gate_mode = config.gate.mode if config.kl_coef > 0 else "off"
        # a fraction that does not adapt need not lie where adaptive ones move
        self.controller = (
            gk.AdaptiveFraction(config.gate.fraction)
            if config.gate.adaptive
            else gk.AdaptiveFraction(config.gate.fraction, low=0.0, high=1.0)
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
        aux = torch.empty(len(self.rewards.aux), total, dtype=proxy.dtype, device=proxy.device)
        for row, name in zip(aux, self.rewards.aux, strict=True):
            row.copy_(self.rewards.maximised(name, scores[name]))
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

        shaped = self._shape(proxy, aux, group_ids, distance)
        # an order statistic of a handful of numbers: one transfer per epoch
        metrics["gate/fraction"] = self.controller.fraction
        metrics["gate/share"] = float(shaped.gate.double().mean())
        metrics["gate/threshold"] = float(shaped.threshold)
        metrics["uncertainty/mean"] = float(shaped.mean_uncertainty)
        starts = accumulate(plan.update_sizes, initial=0)
        mine = plan.sample_ids.to(shaped.gate.device)
        gate = shaped.gate[mine]
        return ShapedEpoch(
            advantage=shaped.advantage[mine].float(),
            gate=gate,
            gated_rows=tuple(gate.nonzero().flatten().tolist()),
            gated_per_update=tuple(int(shaped.gate[a:b].sum()) for a, b in pairwise(starts)),
            metrics=metrics,
            mode=self.gate_mode,
            scores=torch.cat([proxy[None], aux]),
        )

    def _shape(
        self, proxy: Tensor, aux: Tensor, group_ids: Tensor, distance: Tensor | None
    ) -> gk.ShapedRewards:
        gate = self.config.gate
        advantage = gk.shape_rewards(
            proxy,
            aux,
            group_ids,
            distance=distance.double() if self.config.diversity and distance is not None else None,
            advantage_norm=self.config.advantage_norm,
            gate="off",
        ).advantage
        if distance is not None and self.config.diversity:
            # a sample without a distance takes no part in the gate, either
            proxy = torch.where(distance.isfinite(), proxy, torch.nan)
        rule, sign = self._gate_rule()

        def shape(fraction: float) -> gk.ShapedRewards:
            return gk.shape_rewards(
                sign * proxy, sign * aux, group_ids, fraction=fraction, gate=rule, scope=gate.scope
            )

        drawn = shape(self.controller.fraction)
        if self.gate_mode in ("paper", "official"):
            if gate.adaptive:
                # the fraction follows this epoch's uncertainty before the gate is drawn
                self.controller.update(float(drawn.mean_uncertainty))
            drawn = shape(self._share(drawn, proxy, aux))
        return drawn._replace(advantage=advantage)

    def _gate_rule(self) -> tuple[str, int]:
        """The kernel's gate, and the sign of the rewards that it is given.

        The kernel's ``paper`` gate halves ties and takes over-rated samples; its ``official`` gate
        ranks ties in sample order and takes under-rated ones. Negated rewards are under-rated where
        the rewards are over-rated, so a sign gives the other two combinations.
        """
        mode, ties = self.gate_mode, self.config.gate_ties
        if mode not in ("paper", "official") or ties == "auto":
            return mode, 1
        rule = "official" if ties == "ordinal" else "paper"
        return rule, 1 if rule == mode else -1

    def _share(self, drawn: gk.ShapedRewards, proxy: Tensor, aux: Tensor) -> float:
        """The share of the samples with U >= 0 that is gated."""
        fraction = self.controller.fraction
        if self.config.gate.share_of == "nonnegative":
            return fraction
        valid = proxy.isfinite() & aux.isfinite().all(0)
        eligible = int((valid & (drawn.uncertainty >= 0)).sum())
        return min(1.0, fraction * int(valid.sum()) / max(eligible, 1))

    def state_dict(self) -> dict[str, Any]:
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.controller.load_state_dict(state)
