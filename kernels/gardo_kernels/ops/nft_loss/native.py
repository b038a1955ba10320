"""CPU kernels of the DiffusionNFT loss (see ``_native`` and ``csrc``), as ``fused`` calls them."""

from __future__ import annotations

from torch import Tensor

from gardo_kernels import _native


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
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss``, ``stats [2]`` (policy_loss, kl), ``weights [3, B]`` of the gradient."""
    return _native.nft_loss(
        velocity.contiguous(),
        old_velocity.contiguous(),
        x0.contiguous(),
        xt.contiguous(),
        _native.as_float32(t),
        _native.as_float32(advantage),
        beta,
        adv_clip,
        None if gate is None else gate.contiguous(),
        None if ref_velocity is None else ref_velocity.contiguous(),
        kl_coef,
    )


def nft_grad(
    grad: Tensor,
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    weights: Tensor,
    beta: float,
    ref_velocity: Tensor | None,
) -> Tensor:
    """Gradient of the loss by ``velocity``, times the 0-d ``grad``."""
    positive, negative, kl = (weights * grad).unbind()
    return _native.nft_backward(
        velocity.contiguous(),
        old_velocity.contiguous(),
        x0.contiguous(),
        xt.contiguous(),
        _native.as_float32(t),
        beta,
        positive,
        negative,
        kl,
        None if ref_velocity is None else ref_velocity.contiguous(),
    )
