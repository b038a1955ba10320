"""Train one policy by one method, with the kernels and the shaping that the trainer uses."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

import gardo_kernels as gk
from experiments.mixture import distribution, rewards
from experiments.mixture.methods import Method, Part
from experiments.mixture.policy import Rollout, Schedule, VelocityNetwork, roll_out
from gardo.algorithms.adaptive_reference import AdaptiveReference
from gardo.rng import generator


@dataclass(frozen=True)
class Settings:
    """What all methods share."""

    epochs: int = 150
    groups: int = 16
    group_size: int = 24
    updates: int = 2
    steps: int = 20
    noise_level: float = 0.7
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    pretraining_steps: int = 4000
    evaluation_samples: int = 4096


class Run:
    """One method on one part of the experiment from one pretrained policy."""

    def __init__(
        self, part: Part, method: Method, base: VelocityNetwork, settings: Settings, seed: int
    ) -> None:
        self.part, self.settings, self.seed = part, settings, seed
        self.algorithm = method.algorithm
        self.policy = copy.deepcopy(base)
        self.reference = copy.deepcopy(base)
        self.schedule = Schedule.uniform(settings.steps, settings.noise_level)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=settings.learning_rate, weight_decay=1e-4
        )
        self.fraction = gk.AdaptiveFraction(initial=self.algorithm.gate.fraction)
        self.adaptive_reference = AdaptiveReference(self.algorithm.reference)
        group = torch.arange(settings.groups).repeat_interleave(settings.group_size)
        self.group_ids, self.context = group, group % part.contexts

    def epoch(self, index: int) -> dict[str, float]:
        """One rollout and its updates; returns the figures of the rollout."""
        source = generator(self.seed, "rollout", index)
        rollout = roll_out(self.policy, self.schedule, self.context, source)
        points = rollout.samples
        proxy = self.part.proxy(points, self.context)
        aux = rewards.auxiliaries(points)
        shaped = self._shape(proxy, aux, points)
        order = torch.randperm(len(points), generator=source)
        kl_sum = 0.0
        for rows in order.chunk(self.settings.updates):
            kl_sum += self._update(rollout, shaped, rows)
        gated = int(shaped.gate.sum())
        reset = self.algorithm.has_kl and self.adaptive_reference.update(
            kl_sum / gated if gated else None,
            torch.cat([proxy[None], aux]),
        )
        if reset:
            self.reference.load_state_dict(self.policy.state_dict())
        return {
            **region_shares(points, self.context, self.part),
            "gate": gated / len(points),
            "kl": kl_sum / max(gated, 1),
            "uncertainty": float(shaped.mean_uncertainty),
            "reset": float(reset),
            "refused": float(self.adaptive_reference.refused),
        }

    def draw(self) -> Tensor:
        """Fresh samples ``[N, 2]`` in order of the contexts' turns, drawn as in training."""
        source = generator(self.seed, "evaluation")
        return roll_out(self.policy, self.schedule, self._evaluated_context(), source).samples

    def evaluate(self) -> dict[str, float]:
        """Figures of fresh samples."""
        return region_shares(self.draw(), self._evaluated_context(), self.part)

    def _evaluated_context(self) -> Tensor:
        return torch.arange(self.settings.evaluation_samples) % self.part.contexts

    def _shape(self, proxy: Tensor, aux: Tensor, points: Tensor) -> gk.ShapedRewards:
        config = self.algorithm
        distance = None
        if config.diversity:
            distance = gk.nearest_neighbor_distance(rewards.features(points), self.group_ids)
        gate = config.gate.mode if config.has_kl else "off"

        def shape(fraction: float) -> gk.ShapedRewards:
            return gk.shape_rewards(
                proxy.double(),
                aux.double(),
                self.group_ids,
                distance=distance,
                fraction=fraction,
                advantage_norm=config.advantage_norm,
                gate=gate,
                scope=config.gate.scope,
            )

        shaped = shape(self.fraction.fraction)
        if gate == "paper":
            shaped = shape(self.fraction.update(shaped.mean_uncertainty))
        return shaped

    def _update(self, rollout: Rollout, shaped: gk.ShapedRewards, rows: Tensor) -> float:
        """One optimizer step on ``rows``, all steps but the last at once; the sum of their KL."""
        steps = len(self.schedule) - 1  # the last is not trained, as in the trainer
        sample = rollout.latents[:steps, rows].flatten(0, 1)
        previous = rollout.latents[1 : steps + 1, rows].flatten(0, 1)
        step = torch.arange(steps).repeat_interleave(len(rows))
        sigma, context = self.schedule.sigma[step], rollout.context[rows].repeat(steps)
        gate = shaped.gate[rows].repeat(steps)
        gated, kl_coef = int(gate.sum()), self.algorithm.kl_coef
        reference = torch.zeros_like(sample) if kl_coef > 0 else None
        if reference is not None and gated:
            with torch.no_grad():
                reference[gate] = self.reference(sample[gate], sigma[gate], context[gate])
        out = gk.grpo_loss(
            self.policy(sample, sigma, context),
            sample,
            previous,
            rollout.log_prob[:steps, rows].flatten(),
            shaped.advantage[rows].float().repeat(steps),
            self.schedule.coefficients[step],
            clip_range=self.algorithm.clip_range,
            adv_clip=self.algorithm.adv_clip,
            gate=gate if reference is not None else None,
            ref_velocity=reference,
            kl_coef=kl_coef,
            kl_reduction=self.algorithm.kl_reduction,
        )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(out.kl) * gated / steps


def region_shares(points: Tensor, context: Tensor, part: Part) -> dict[str, float]:
    """Shares of samples by region, and mean rewards."""

    def mean(values: Tensor) -> float:
        return float(values.double().mean())

    last = points[context == part.contexts - 1]
    return {
        "centre": mean(distribution.in_centre(points)),
        "hacked": mean(distribution.in_hack(points)),
        "off": mean(distribution.off_manifold(points)),
        "off_last_context": mean(distribution.off_manifold(last)),
        "true": mean(rewards.true_reward(points)),
        "proxy": mean(part.proxy(points, context)),
    }
