"""The fused DiffusionNFT loss as a PyTorch custom operator (see ``ops.sde.fused``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gardo_kernels._operators import (
    below_autograd,
    differentiable_operator,
    keep,
    kernels,
    operator,
    without_grad,
)


def _kernel(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    advantage: Tensor,
    beta: float,
    adv_clip: float,
    gate: Tensor | None,
    ref_velocity: Tensor | None,
    kl_coef: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels("nft_loss", backend).nft_loss(
        velocity,
        old_velocity,
        x0,
        xt,
        t,
        advantage,
        beta,
        adv_clip,
        gate,
        ref_velocity,
        kl_coef,
    )


def _fake(velocity: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return velocity.new_empty(shape, dtype=torch.float32)

    return empty(), empty(2), empty(3, velocity.shape[0])


def _grad_kernel(
    grad: Tensor,
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    weights: Tensor,
    beta: float,
    ref_velocity: Tensor | None,
    backend: str,
) -> Tensor:
    return kernels("nft_loss", backend).nft_grad(
        grad, velocity, old_velocity, x0, xt, t, weights, beta, ref_velocity
    )


def _grad_fake(grad: Tensor, velocity: Tensor, *rest: Any) -> Tensor:
    return velocity.new_empty(velocity.shape)


_nft_grad = operator("nft_grad", _grad_kernel, _grad_fake)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        velocity, old_velocity, x0, xt, t, _, beta, _, _, ref, _, backend = args
        loss, stats, weights = below_autograd(_op, *args)
        keep(ctx, velocity, old_velocity, x0, xt, t, weights, ref)
        ctx.beta, ctx.backend = beta, backend
        ctx.mark_non_differentiable(stats, weights)
        return loss, stats, weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        velocity, old_velocity, x0, xt, t, weights, ref = ctx.saved_tensors
        by_velocity = _nft_grad(
            grad, velocity, old_velocity, x0, xt, t, weights, ctx.beta, ref, ctx.backend
        )
        return by_velocity, *(None,) * 11


_op, _nft_loss = differentiable_operator("nft_loss", _kernel, _fake, _Loss)


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    advantage: Tensor,
    beta: float,
    adv_clip: float,
    gate: Tensor | None,
    ref_velocity: Tensor | None,
    kl_coef: float,
    kl_when_ungated: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss, policy_loss, kl`` by the kernels of ``backend``."""
    if gate is not None and kl_when_ungated == "all":
        gate = gate | ~gate.any()
    loss, stats, _ = _nft_loss(
        velocity,
        without_grad(old_velocity),
        without_grad(x0),
        without_grad(xt),
        without_grad(t),
        without_grad(advantage),
        beta,
        adv_clip,
        gate,
        None if ref_velocity is None else without_grad(ref_velocity),
        kl_coef,
        backend,
    )
    policy_loss, kl = without_grad(stats).unbind()
    return loss, policy_loss, kl
