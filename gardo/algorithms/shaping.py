"""From scores to advantages and the gate, over the samples of all processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.algorithms.reward_shaper import RewardShaper
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
        uncertainty: ``[N]`` of the same samples, against those of the base; None without an anchor.
    """

    advantage: Tensor
    gate: Tensor
    gated_rows: tuple[int, ...]
    gated_per_update: tuple[int, ...]
    metrics: dict[str, float]
    mode: str = "paper"
    scores: Tensor | None = None
    uncertainty: Tensor | None = None


class Shaper(RewardShaper):
    """Gathers an epoch's scores from all processes, shapes them, and returns this one's part."""

    def __init__(self, config: AlgorithmConfig, rewards: RewardSet) -> None:
        super().__init__(config)
        self.rewards = rewards

    def __call__(self, book: ScoreBook, plan: EpochPlan, runtime: Runtime) -> ShapedEpoch:
        """The samples of ``plan`` with the scores in ``book``; all processes call this."""
        total = sum(plan.update_sizes)

        def gather(rows: Tensor) -> Tensor:
            return runtime.gather(rows.to(runtime.device), plan.sample_ids, total)

        metrics: dict[str, float] = {}
        scores: dict[str, Tensor] = {}
        for name in self.rewards.training_names:
            scores[name] = gather(book.scores(name)).double()
            self.rewards.check_missing(name, scores[name])
            metrics |= reward_metrics(name, scores[name], book.seconds_per_image(name))
        correct = None
        details = book.details()
        for name in runtime.union(details):
            rows = gather(details.get(name, torch.full(plan.sample_ids.shape, torch.nan))).double()
            metrics[f"reward/{name}/mean"] = float(rows.nanmean())
            if name.endswith("/strict"):
                correct = rows
        proxy = self.rewards.proxy_scores(scores)
        if self.rewards.proxy not in scores:
            metrics |= reward_metrics(self.rewards.proxy, proxy)
        aux = [self.rewards.maximised(name, scores[name]) for name in self.rewards.aux]
        rewards = torch.stack([proxy, *aux])
        group_ids = torch.arange(total, device=proxy.device) % plan.prompts

        distance = None
        features = book.features()
        if features is not None:
            distance = gk.nearest_neighbor_distance(gather(features), group_ids)
            # a sample without an image has no distance
            metrics["diversity/nn_distance"] = float(distance.nanmean())
        small = book.thumbnails()
        if small is not None:
            metrics["diversity/image_variance"] = float(image_variance(gather(small), group_ids))

        sigmas = {n: s for n in self.rewards.training_names if (s := book.sigma(n)) is not None}
        for name in runtime.union(sigmas):
            rows = sigmas.get(name, torch.full(plan.sample_ids.shape, torch.nan))
            sigmas[name] = gather(rows).double()
            metrics[f"reward/{name}/sigma"] = float(sigmas[name].nanmean())
            metrics[f"reward/{name}/sigma/missing"] = float(sigmas[name].isnan().double().mean())
        judges = self._judges(rewards[1:], sigmas)
        shaped = self.shape(proxy, judges, group_ids, distance, correct)
        gate = shaped.gate
        starts = accumulate(plan.update_sizes, initial=0)
        mine = plan.sample_ids.to(gate.device)
        own = gate[mine]
        return ShapedEpoch(
            advantage=shaped.advantage[mine],
            gate=own,
            gated_rows=tuple(own.nonzero().flatten().tolist()),
            gated_per_update=tuple(int(gate[a:b].sum()) for a, b in pairwise(starts)),
            metrics=metrics | shaped.metrics,
            mode=self.gate_mode,
            scores=rewards,
            uncertainty=shaped.uncertainty,
        )

    def _judges(self, aux: Tensor, sigmas: Mapping[str, Tensor]) -> Tensor:
        """Whose win rates the proxy's is compared with: the surer the proxy is, the better."""
        who = self.config.gate.uncertainty
        if who == "ensemble" or not self.config.needs_judges:
            return aux
        sigma = self.rewards.proxy_sigma({n: sigmas.get(n) for n in self.rewards.proxy_weights})
        self.rewards.check_missing(f"{self.rewards.proxy} (sigma)", sigma)
        return torch.cat([aux if who == "both" else aux[:0], -sigma[None]])
