"""The GRPO loss at the size of SD3.5 latents at 512x512, for ``python -m gardo_kernels``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import gardo_kernels as gk


def checks(
    normal: Callable[..., Tensor],
) -> dict[str, Callable[[str, torch.dtype], tuple[Tensor, ...]]]:
    """By the name of the op, what gives its outputs for a backend and a dtype."""
    v, u, ref, x, z = (normal(9, 16, 64, 64) for _ in range(5))
    table = gk.sde_coefficients(0.6, 0.5).to(v.device)
    prev = gk.sde_step(v, x, table, noise=z, backend="reference").prev_sample
    old = gk.sde_log_prob(v + 0.01 * u, x, prev, table, backend="reference")
    advantage = normal(9)
    gate = torch.arange(9, device=v.device) % 2 == 0

    def grpo(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        velocity = v.to(dtype).requires_grad_()
        latents = (velocity, x.to(dtype), prev.to(dtype))
        out = gk.grpo_loss(
            *(*latents, old.to(dtype), advantage.to(dtype), table),
            clip_range=0.1,
            gate=gate,
            ref_velocity=ref.to(dtype),
            kl_coef=0.04,
            backend=backend,
        )
        return out.loss, out.ratio, *torch.autograd.grad(out.loss, velocity)

    return {"grpo_loss": grpo}
