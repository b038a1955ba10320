"""The fused SDE ops as PyTorch operators, with the gradients of what is built on them.

An operator is opaque to ``torch.compile``: compiled or not, the same kernels run and give the same
bits. The reference form is not wrapped; it is ordinary differentiable PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gardo_kernels.operators import Gradient, operator
from gardo_kernels.ops.sde import native


def rows_like(velocity: Tensor) -> Tensor:
    """Without data, what an operator returns as ``[B]`` float32."""
    return velocity.new_empty(velocity.shape[0], dtype=torch.float32)


def _step_outputs(velocity: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    prev = velocity.new_empty(velocity.shape, dtype=torch.float32)
    return prev, rows_like(velocity), torch.empty_like(prev)


def _grad_outputs(velocity: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    uncond = rest[-2]
    by_velocity = velocity.new_empty(velocity.shape)
    if uncond is None:
        return by_velocity, velocity.new_empty(0, dtype=torch.float32)
    return by_velocity, uncond.new_empty(velocity.shape)


sde_step = operator(native.sde_step, _step_outputs)
velocity_grad = operator(native.velocity_grad, _grad_outputs)


def grad_by_velocities(
    backend: str,
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    coef: Sequence[Tensor],
    *weights: Any,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor | None]:
    """The operator ``velocity_grad``; the second result is None without ``velocity_uncond``."""
    by_velocity, by_uncond = velocity_grad(
        backend, velocity, sample, prev_sample, coef, *weights, velocity_uncond, guidance_scale
    )
    return by_velocity, None if velocity_uncond is None else by_uncond


def _log_prob_saved(operands: Sequence[Any], _: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    velocity, sample, prev_sample, coef, uncond, _ = operands
    return velocity, sample, prev_sample, uncond, *coef


def _log_prob_backward(
    backend: str,
    grad: Tensor,
    numbers: dict[str, Any],
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    uncond: Tensor | None,
    *coef: Tensor,
) -> tuple[Tensor, Tensor | None]:
    batch = velocity.shape[0]
    n = velocity.numel() // max(batch, 1)
    _, b, _, scale, *_ = coef
    alpha = (2 / max(n, 1) * scale * b).expand(batch).contiguous()
    step = (velocity, sample, prev_sample, coef)
    guidance = {"velocity_uncond": uncond, "guidance_scale": numbers["guidance_scale"]}
    return grad_by_velocities(backend, *step, grad, alpha, None, None, **guidance)


sde_log_prob = operator(
    native.sde_log_prob,
    lambda velocity, *_: rows_like(velocity),
    Gradient(("velocity", "velocity_uncond"), _log_prob_saved, _log_prob_backward),
)
