"""The NFT loss at the size of SD3.5 latents at 512x512, for ``python -m gardo_kernels``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import gardo_kernels as gk


def checks(
    normal: Callable[..., Tensor],
) -> dict[str, Callable[[str, torch.dtype], tuple[Tensor, ...]]]:
    """By the name of the op, what gives its outputs for a backend and a dtype."""
    v, u, ref, x, xt = (normal(9, 16, 64, 64) for _ in range(5))
    advantage, t = normal(9), torch.linspace(0.1, 0.9, 9, device=v.device)
    gate = torch.arange(9, device=v.device) % 2 == 0

    def nft(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        velocity = v.to(dtype).requires_grad_()
        out = gk.nft_loss(
            *(velocity, u.to(dtype), x.to(dtype), xt.to(dtype), t.to(dtype)),
            advantage.to(dtype),
            gate=gate,
            ref_velocity=ref.to(dtype),
            kl_coef=0.04,
            backend=backend,
        )
        return out.loss, *torch.autograd.grad(out.loss, velocity)

    return {"nft_loss": nft}
