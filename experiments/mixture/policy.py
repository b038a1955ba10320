"""The policy: a small velocity network, its pretraining by flow matching, and its SDE rollout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gardo_kernels as gk
from experiments.mixture import distribution
from gardo.rng import derive_seed, generator

CONTEXTS = 2
_FREQUENCIES = 4


class VelocityNetwork(nn.Module):
    """MLP from a point, its time and its context to a velocity."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        inputs = 2 + 1 + 2 * _FREQUENCIES + CONTEXTS
        self.layers = nn.Sequential(
            nn.Linear(inputs, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """``x [B, 2]``, ``t [B]`` in [0, 1] (1 is noise), ``context [B]`` int64 -> ``[B, 2]``."""
        angle = t[:, None] * (math.pi * torch.arange(1, _FREQUENCIES + 1))
        one_hot = nn.functional.one_hot(context, CONTEXTS).to(x.dtype)
        features = torch.cat([x, t[:, None], angle.sin(), angle.cos(), one_hot], dim=1)
        velocity: Tensor = self.layers(features)
        return velocity


def pretrain(seed: int, steps: int, batch_size: int = 512) -> VelocityNetwork:
    """Fit the mixture by flow matching: ``x_t = (1-t)*x0 + t*noise``, target ``noise - x0``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initial weights"))
        network = VelocityNetwork()
    source = generator(seed, "pretraining")
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(steps):
        x0 = distribution.draw(batch_size, source)
        noise = torch.randn(batch_size, 2, generator=source)
        t = torch.rand(batch_size, generator=source)
        context = torch.randint(CONTEXTS, (batch_size,), generator=source)
        x_t = torch.lerp(x0, noise, t[:, None])
        loss = (network(x_t, t, context) - (noise - x0)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


@dataclass(frozen=True)
class Schedule:
    """Flow-GRPO's SDE on equally spaced sigmas, from noise (sigma 1) to data (sigma 0).

    Attributes:
        sigma: ``[T + 1]``.
        coefficients: of the T steps.
    """

    sigma: Tensor
    coefficients: gk.SDECoefficients

    @classmethod
    def uniform(cls, steps: int, noise_level: float) -> Schedule:
        sigma = torch.linspace(1, 0, steps + 1)
        table = gk.sde_coefficients(
            sigma[:-1], sigma[1:], noise_level, kind="flow", sigma_max=float(sigma[1])
        )
        return cls(sigma, table)

    def __len__(self) -> int:
        return len(self.coefficients)


@dataclass(frozen=True)
class Rollout:
    """Trajectories of N samples.

    Attributes:
        latents: ``[T + 1, N, 2]``, the last being the samples themselves.
        log_prob: ``[T, N]``.
        context: ``[N]`` int64.
    """

    latents: Tensor
    log_prob: Tensor
    context: Tensor

    @property
    def samples(self) -> Tensor:
        return self.latents[-1]


@torch.no_grad()
def roll_out(
    network: VelocityNetwork, schedule: Schedule, context: Tensor, source: torch.Generator
) -> Rollout:
    """Sample one trajectory per entry of ``context``."""
    count = len(context)
    latents = torch.empty(len(schedule) + 1, count, 2)
    log_prob = torch.empty(len(schedule), count)
    noise = torch.randn(latents.shape, generator=source)
    latents[0] = noise[0]
    for i in range(len(schedule)):
        velocity = network(latents[i], schedule.sigma[i].expand(count), context)
        step = gk.sde_step(velocity, latents[i], schedule.coefficients[i], noise=noise[i + 1])
        latents[i + 1], log_prob[i] = step.prev_sample, step.log_prob
    return Rollout(latents, log_prob, context)
