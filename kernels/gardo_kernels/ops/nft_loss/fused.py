"""The fused DiffusionNFT loss as a PyTorch operator (see ``ops/sde/fused.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gardo_kernels.operators import Gradient, operator
from gardo_kernels.ops.nft_loss import native


def _outputs(velocity: Tensor, *_: Any) -> tuple[Tensor, ...]:
    shapes = ((), (2,), (3, velocity.shape[0]))
    return tuple(velocity.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _saved(operands: Sequence[Any], outputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    velocity, old_velocity, x0, xt, t, *_, ref, _, _ = operands
    return velocity, old_velocity, x0, xt, t, outputs[2], ref


def _backward(
    backend: str,
    grad: Tensor,
    numbers: dict[str, Any],
    *saved: Tensor,
) -> tuple[Tensor]:
    *latents, weights, ref = saved
    return (nft_grad(backend, *latents, grad, weights, numbers["beta"], ref),)


nft_grad = operator(native.nft_grad, lambda velocity, *_: velocity.new_empty(velocity.shape))
nft_loss = operator(native.nft_loss, _outputs, Gradient(("velocity",), _saved, _backward))
