"""The fused GRPO loss as a PyTorch operator (see ``ops/sde/fused.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gardo_kernels.operators import Gradient, operator
from gardo_kernels.ops.grpo_loss import native
from gardo_kernels.ops.sde.fused import grad_by_velocities, rows_like


def _outputs(velocity: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows = (rows_like(velocity) for _ in range(4))
    return (*(velocity.new_empty(shape, dtype=torch.float32) for shape in ((), (3,))), *rows)


def _saved(operands: Sequence[Any], outputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    velocity, sample, prev_sample, _, _, coef, *_, ref, _, _, noise, uncond, _ = operands
    *_, alpha, beta = outputs
    if noise is not None:  # alpha*(prev - a*x - b*v) is to be alpha*noise
        zero = torch.zeros_like(coef[0])
        prev_sample, coef = noise, [zero] * len(coef)
    return velocity, sample, prev_sample, alpha, beta, ref, uncond, *coef


def _backward(
    backend: str,
    grad: Tensor,
    numbers: dict[str, Any],
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    alpha: Tensor,
    beta: Tensor,
    ref: Tensor | None,
    uncond: Tensor | None,
    *coef: Tensor,
) -> tuple[Tensor, Tensor | None]:
    step = (velocity, sample, prev_sample, coef)
    weights = (grad, alpha, None if ref is None else beta, ref)
    guidance = {"velocity_uncond": uncond, "guidance_scale": numbers["guidance_scale"]}
    return grad_by_velocities(backend, *step, *weights, **guidance)


grpo_loss = operator(
    native.grpo_loss, _outputs, Gradient(("velocity", "velocity_uncond"), _saved, _backward)
)
