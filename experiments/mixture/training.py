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
from gardo.algorithms.gradient_share import PROBE
from gardo.algorithms.reward_shaper import RewardShaper, Shaped
from gardo.algorithms.strength import KLStrength
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
        self.shaper = RewardShaper(self.algorithm)
        self.strength = KLStrength(self.algorithm)
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
        distance = gk.nearest_neighbor_distance(rewards.features(points), self.group_ids)
        shaped = self.shaper.shape(proxy.double(), aux.double(), self.group_ids, distance)
        order = torch.randperm(len(points), generator=source)
        strength = self._measure_strength(rollout, shaped, order[:PROBE])
        kl_sum = 0.0
        for rows in order.chunk(self.settings.updates):
            kl_sum += self._update(rollout, shaped, rows)
        gated = int(shaped.gate.sum())
        reset = self.algorithm.has_kl and self.adaptive_reference.update(
            kl_sum / gated if gated else None,
            torch.cat([proxy[None], aux]),
            shaped.uncertainty,
            steps=self.settings.updates,
        )
        if reset:
            self.reference.load_state_dict(self.policy.state_dict())
        return {
            **region_shares(points, self.context, self.part),
            "gate": gated / len(points),
            "kl": kl_sum / max(gated, 1),
            "uncertainty": shaped.metrics["uncertainty/mean"],
            "advantage_rms": shaped.metrics["advantage/rms"],
            "cap": shaped.metrics.get("cap/share", 0.0),
            **strength,
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

    def _update(self, rollout: Rollout, shaped: Shaped, rows: Tensor) -> float:
        """One optimizer step on ``rows``; the sum of their KL."""
        gated = int(shaped.gate[rows].sum())
        out = self._loss(rollout, shaped, rows, self.strength.coefficient)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(out.kl) * (gated if self.algorithm.kl_reduction == "gated" else len(rows))

    def _loss(self, rollout: Rollout, shaped: Shaped, rows: Tensor, kl_coef: float) -> gk.GRPOLoss:
        """Over ``rows``, all steps at once but the last, which the trainer does not train."""
        steps = len(self.schedule) - 1
        sample = rollout.latents[:steps, rows].flatten(0, 1)
        previous = rollout.latents[1 : steps + 1, rows].flatten(0, 1)
        step = torch.arange(steps).repeat_interleave(len(rows))
        sigma, context = self.schedule.sigma[step], rollout.context[rows].repeat(steps)
        gate = shaped.gate[rows].repeat(steps)
        reference = torch.zeros_like(sample) if self.algorithm.has_kl else None
        if reference is not None and gate.any():
            with torch.no_grad():
                reference[gate] = self.reference(sample[gate], sigma[gate], context[gate])
        return gk.grpo_loss(
            self.policy(sample, sigma, context),
            sample,
            previous,
            rollout.log_prob[:steps, rows].flatten(),
            shaped.advantage[rows].repeat(steps),
            self.schedule.coefficients[step],
            clip_range=self.algorithm.clip_range,
            adv_clip=self.algorithm.adv_clip,
            gate=gate if reference is not None else None,
            ref_velocity=reference,
            kl_coef=kl_coef,
            kl_reduction=self.algorithm.kl_reduction,
        )

    def _measure_strength(self, rollout: Rollout, shaped: Shaped, rows: Tensor) -> dict[str, float]:
        """The KL's gradient against the policy's, as the trainer measures it, at all steps."""
        if not self.algorithm.has_kl:
            return {}
        parameters = list(self.policy.parameters())
        silent = shaped._replace(advantage=torch.zeros_like(shaped.advantage))
        losses = (
            self._loss(rollout, shaped, rows, kl_coef=0.0),
            self._loss(rollout, silent, rows, kl_coef=1.0),
        )
        norms = [
            float(torch.nn.utils.get_total_norm(torch.autograd.grad(out.loss, parameters)))
            for out in losses
        ]
        if self.adaptive_reference.steps_since_reset == 0:
            norms[1] = 0.0  # the policy is the reference but for rounding
        figures = self.strength.observe(*norms)
        return {name.removeprefix("kl/"): value for name, value in figures.items()}


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
