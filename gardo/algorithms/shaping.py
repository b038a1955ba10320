"""From scores to advantages and the gate, over the samples of all processes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.config import AlgorithmConfig
from gardo.rewards.scoring import RewardSet, ScoreBook, reward_metrics
from gardo.runtime.process import Runtime
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
    """

    advantage: Tensor
    gate: Tensor
    gated_rows: tuple[int, ...]
    gated_per_update: tuple[int, ...]
    metrics: dict[str, float]


class Shaper:
    """GARDO's reward shaping (arXiv 2512.24138) with its adaptive gate fraction."""

    def __init__(self, config: AlgorithmConfig, rewards: RewardSet) -> None:
        self.config = config
        self.rewards = rewards
        # without a KL term there is nothing to gate
        self.gate_mode = config.gate.mode if config.kl_coef > 0 else "off"
        self.controller = gk.AdaptiveFraction(initial=config.gate.fraction)

    def __call__(self, book: ScoreBook, plan: EpochPlan, runtime: Runtime) -> ShapedEpoch:
        total = sum(plan.update_sizes)
        metrics: dict[str, float] = {}
        columns = []
        for name in self.rewards.training_names:
            scores = runtime.gather(book.scores(name), plan.sample_ids, total).double()
            self.rewards.check_missing(name, scores)
            metrics |= reward_metrics(name, scores, book.seconds_per_image(name))
            columns.append(self.rewards.maximised(name, scores))
        group_ids = torch.arange(total, device=columns[0].device) % plan.prompts

        distance = None
        features = book.features()
        if features is not None:
            gathered = runtime.gather(features, plan.sample_ids, total)
            distance = gk.nearest_neighbor_distance(gathered, group_ids)
            # a sample without an image has no distance
            metrics["diversity/nn_distance"] = float(distance.nanmean())

        shaped = self._shape(columns, group_ids, distance)
        # an order statistic of a handful of numbers: one transfer per epoch
        metrics["gate/fraction"] = self.controller.fraction
        metrics["gate/share"] = float(shaped.gate.double().mean())
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
        )

    def _shape(
        self, columns: list[Tensor], group_ids: Tensor, distance: Tensor | None
    ) -> gk.ShapedRewards:
        proxy, aux = columns[0], torch.stack(columns[1:]) if columns[1:] else columns[0][:0]
        aux = aux.reshape(len(columns) - 1, len(proxy))

        def shape(fraction: float) -> gk.ShapedRewards:
            return gk.shape_rewards(
                proxy,
                aux,
                group_ids,
                distance=distance.double()
                if self.config.diversity and distance is not None
                else None,
                fraction=fraction,
                advantage_norm=self.config.advantage_norm,
                gate=self.gate_mode,
                scope=self.config.gate.scope,
            )

        before = self.controller.fraction
        shaped = shape(before)
        if self.config.gate.adaptive and self.gate_mode in ("paper", "official"):
            # the fraction follows this epoch's uncertainty before the gate is drawn
            after = self.controller.update(float(shaped.mean_uncertainty))
            if after != before:
                shaped = shape(after)
        return shaped

    def state_dict(self) -> dict[str, Any]:
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.controller.load_state_dict(state)
