"""The DiffusionNFT loss of one micro-batch and timestep, with gated KL."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gardo_kernels import backends, checks
from gardo_kernels.inference import ordinary
from gardo_kernels.ops.grpo_loss import check_kl
from gardo_kernels.ops.nft_loss import fused, native, reference

__all__ = ["NFTLoss", "nft_loss"]

#: Backends by name, best first: the files of this folder.
BACKENDS = backends.discover(__name__, __path__)
_KL_WHEN_UNGATED = ("none", "all")


class NFTLoss(NamedTuple):
    """Result of :func:`nft_loss`. Only ``loss`` carries a gradient."""

    loss: Tensor
    policy_loss: Tensor
    kl: Tensor


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    advantage: Tensor,
    beta: float = 1.0,
    adv_clip: float = 5.0,
    gate: Tensor | None = None,
    ref_velocity: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_when_ungated: str = "none",
    backend: str | None = None,
    reduction: str = "mean",
) -> NFTLoss:
    """DiffusionNFT: draw ``v`` to good samples and away from bad ones, on the forward process::

        r  = clamp(A/(2*adv_clip) + 1/2, 0, 1)
        v+ = beta*v + (1-beta)*v_old          v- = (1+beta)*v_old - beta*v
        x0^ = x_t - t*v±                      l± = mean((x0^ - x0)^2) / max(mean|x0^ - x0|, 1e-5)
        loss = mean(adv_clip * (r*l+ + (1-r)*l-)/beta) + kl_coef * KL

    The weight ``mean|x0^ - x0|`` carries no gradient. KL is the mean over the gated samples of the
    mean square difference of ``velocity`` and ``ref_velocity``.

    Args:
        velocity, old_velocity: ``[B, ...]`` of the policy and the behaviour policy at ``xt``.
        x0, xt: ``[B, ...]`` clean latents and ``(1-t)*x0 + t*noise``.
        t: ``[B]`` or 0-d, in ``[0, 1]``.
        advantage: ``[B]``.
        beta: guidance strength of the implicit policies, > 0.
        adv_clip: advantage that counts as fully preferred, > 0.
        gate: bool ``[B]``, the samples with a KL penalty; None means all of them.
        ref_velocity: ``[B, ...]``; rows outside the gate may hold anything.
        kl_coef: weight of the KL; a non-zero weight needs ``ref_velocity``.
        kl_when_ungated: when no sample is gated: ``none`` adds no KL, ``all`` penalises every
            sample (which is what published code did).
        backend: None for the best available, or a name.
        reduction: ``mean`` as above; ``sum``: ``policy_loss`` is the sum over the samples and
            ``kl`` that over the gated ones, so that their weights are the caller's alone.

    Returns:
        0-d ``loss``, ``policy_loss``, ``kl`` (without ``kl_coef``); float32, or float64 if a latent
        input is float64. ``loss`` is differentiable in ``velocity`` only. Empty batch: 0.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype, device or value.
        BackendUnavailable: the backend asked for cannot run here.
    """
    checks.latents("velocity", velocity)
    batch, device = velocity.shape[0], velocity.device
    for name, value in (("old_velocity", old_velocity), ("x0", x0), ("xt", xt)):
        checks.latents(name, value, like=velocity)
    checks.floating("t", t)
    if t.dim() == 0:
        checks.same_device("t", t, device)
    else:
        checks.shaped("t", t, (batch,), device)
    checks.per_sample("advantage", advantage, batch, device)
    checks.number("beta", beta, low=0.0, exclusive_low=True)
    checks.number("adv_clip", adv_clip, low=0.0, exclusive_low=True)
    check_kl(velocity, gate, ref_velocity, kl_coef)
    checks.choice("reduction", reduction, native.REDUCTIONS)
    checks.choice("kl_when_ungated", kl_when_ungated, _KL_WHEN_UNGATED)
    dtype = checks.compute_dtype(velocity, old_velocity, x0, xt, ref_velocity)
    chosen = backends.select("nft_loss", backend, device, dtype, BACKENDS)
    if gate is not None and kl_when_ungated == "all":
        gate = gate | ~gate.any()
    operands = (
        velocity,
        old_velocity,
        x0,
        xt,
        t,
        advantage,
        float(beta),
        float(adv_clip),
        gate,
        ref_velocity,
        float(kl_coef),
        reduction,
    )
    if chosen == "reference":
        loss, policy_loss, kl = reference.nft_loss(*ordinary((*operands, dtype)))
    else:
        loss, stats, _ = fused.nft_loss(chosen, *operands)
        policy_loss, kl = stats.unbind()
    return NFTLoss(loss, policy_loss.detach(), kl.detach())
