"""The SDE ops at the size of SD3.5 latents at 512x512, for ``python -m gardo_kernels``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import gardo_kernels as gk


def checks(
    normal: Callable[..., Tensor],
) -> dict[str, Callable[[str, torch.dtype], tuple[Tensor, ...]]]:
    """By the name of the op, what gives its outputs for a backend and a dtype."""
    v, u, x, z = (normal(9, 16, 64, 64) for _ in range(4))
    table = gk.sde_coefficients(0.6, 0.5).to(v.device)
    prev = gk.sde_step(v, x, table, noise=z, backend="reference").prev_sample

    def step(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return gk.sde_step(
            *(v.to(dtype), x.to(dtype), table),
            noise=z.to(dtype),
            velocity_uncond=u.to(dtype),
            guidance_scale=4.5,
            backend=backend,
        )

    def log_prob(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (gk.sde_log_prob(v.to(dtype), x.to(dtype), prev.to(dtype), table, backend=backend),)

    return {"sde_step": step, "sde_log_prob": log_prob}
