"""The ops as published trainers write them: separate torch operations, host numpy for groups.

Written for these benchmarks from the formulas; the structure (which steps are separate, what runs
on the host) is that of the trainers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def guided(v: Tensor, u: Tensor | None, guidance: float) -> Tensor:
    """Classifier-free guidance, where there is an unconditional velocity."""
    return (v if u is None else u + guidance * (v - u)).float()


def sde_step(
    v: Tensor,
    u: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    guidance: float,
    s: Tensor,
    s_next: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Flow-GRPO step: ``s`` and ``s_next`` are ``[B, 1, ...]``."""
    velocity = guided(v, u, guidance)
    x = x.float()
    mean, noise_scale = transition(velocity, x, s, s_next)
    if z is None:
        z = torch.randn(velocity.shape, device=velocity.device, dtype=velocity.dtype)
    prev = mean + noise_scale * z
    return prev, log_prob(prev, mean, noise_scale), mean


def sde_log_prob(
    v: Tensor, u: Tensor | None, x: Tensor, prev: Tensor, guidance: float, s: Tensor, s_next: Tensor
) -> Tensor:
    """Log-probability of a stored step under the policy in training."""
    mean, noise_scale = transition(guided(v, u, guidance), x.float(), s, s_next)
    return log_prob(prev.float(), mean, noise_scale)


def transition(velocity: Tensor, x: Tensor, s: Tensor, s_next: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the step, eta = 0.7."""
    dt = s_next - s
    std = torch.sqrt(s / (1 - s)) * 0.7
    mean = x * (1 + std**2 / (2 * s) * dt) + velocity * (1 + std**2 * (1 - s) / (2 * s)) * dt
    return mean, std * torch.sqrt(-dt)


def log_prob(prev: Tensor, mean: Tensor, noise_scale: Tensor) -> Tensor:
    """Mean log-density over the latent dimensions."""
    density = (
        -((prev.detach() - mean) ** 2) / (2 * noise_scale**2)
        - torch.log(noise_scale)
        - math.log(math.sqrt(2 * math.pi))
    )
    return density.mean(dim=tuple(range(1, density.ndim)))


def grpo_loss(
    v: Tensor,
    u: Tensor | None,
    x: Tensor,
    prev: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    gate: Tensor,
    ref: Tensor,
    guidance: float,
    s: Tensor,
    s_next: Tensor,
) -> Tensor:
    """Clipped policy loss and KL of the gated rows."""
    velocity = guided(v, u, guidance)
    mean, noise_scale = transition(velocity, x.float(), s, s_next)
    ratio = torch.exp(log_prob(prev.float(), mean, noise_scale) - old_log_prob)
    a = torch.clamp(advantage, -5, 5)
    policy = torch.maximum(-a * ratio, -a * torch.clamp(ratio, 1 - 1e-4, 1 + 1e-4)).mean()
    with torch.no_grad():
        ref_mean, _ = transition(ref.float(), x.float(), s, s_next)
    weight = gate.to(velocity.dtype)
    square = ((mean - ref_mean) ** 2).mean(dim=tuple(range(1, mean.ndim)), keepdim=True)
    kl = (square / (2 * noise_scale**2)).flatten()
    return policy + 0.04 * (kl * weight).sum() / weight.sum()


def nft_loss(
    v: Tensor, old: Tensor, x0: Tensor, xt: Tensor, t: Tensor, advantage: Tensor, ref: Tensor
) -> Tensor:
    """DiffusionNFT with beta 1 and a KL on every row."""
    axes = tuple(range(1, x0.ndim))
    column = t.view(-1, *([1] * (x0.ndim - 1)))
    share = torch.clamp(torch.clamp(advantage, -5, 5) / 5 / 2 + 0.5, 0, 1)
    losses = []
    for velocity in (v.float(), 2.0 * old.float() - v.float()):
        prediction = xt - column * velocity
        with torch.no_grad():
            weight = (prediction.double() - x0.double()).abs().mean(axes, keepdim=True)
            weight = weight.clip(min=1e-5)
        losses.append(((prediction - x0) ** 2 / weight).mean(axes))
    policy = ((share * losses[0] + (1 - share) * losses[1]) * 5).mean()
    return (policy + 0.04 * ((v.float() - ref.float()) ** 2).mean(axes).mean()).float()


def win_rate(rewards: Tensor) -> Tensor:
    """Share of the others that each sample beats, by comparing all pairs; a tie counts one half."""
    wins = [(r[:, None] > r).float() + 0.5 * (r[:, None] == r) for r in rewards]
    return torch.stack([(w.sum(1) - 0.5) / (len(w) - 1) for w in wins])


def shaping(
    features: np.ndarray, proxy: np.ndarray, aux: np.ndarray, prompts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages with the diversity factor, prompt by prompt, and the rank-based gate.

    As in the trainers, samples are grouped by their prompt's text and ``proxy`` is ``[N, T]``, one
    equal column per trained timestep.
    """
    unit = features / np.linalg.norm(features, ord=2, axis=1, keepdims=True)
    advantage = np.zeros_like(proxy)
    for prompt in np.unique(prompts):
        rewards = proxy[prompts == prompt]
        members = unit[prompts == prompt]
        distances = 1 - np.dot(members, members.T).clip(-1, 1)
        nearest = np.zeros(len(distances))
        for i in range(len(distances)):
            others = np.ones(len(distances), dtype=bool)
            others[i] = False
            nearest[i] = np.min(distances[i, others])
        factor = np.repeat(nearest[:, np.newaxis], rewards.shape[-1], axis=1) / nearest.mean()
        centred = rewards - rewards.mean(axis=0, keepdims=True)
        advantage[prompts == prompt] = centred * np.where(centred < 0, 1, factor)
    ranks = []
    for reward in (proxy[:, 0], *aux):
        values = torch.tensor(reward)
        _, order = torch.sort(values, descending=True)
        rank = torch.empty_like(values).long()
        rank[order] = torch.arange(1, len(values) + 1)
        ranks.append(rank.float())
    gap = ranks[0] - torch.stack(ranks[1:]).mean(0)
    positive = np.array([g for g in gap.numpy() if g >= 0])
    return advantage, gap.numpy() > np.percentile(positive, 90)
