"""The GRPO loss of one micro-batch and timestep, with gated KL."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from gardo_kernels import backends, checks
from gardo_kernels.inference import ordinary
from gardo_kernels.ops.grpo_loss import fused, reference
from gardo_kernels.ops.sde import SDECoefficients, check_density, check_velocities

__all__ = ["GRPOLoss", "grpo_loss"]

#: Backends by name, best first: the files of this folder.
BACKENDS = backends.discover(__name__, __path__)
_KL_REDUCTIONS = ("gated", "batch")
_REDUCTIONS = ("mean", "sum")


class GRPOLoss(NamedTuple):
    """Result of :func:`grpo_loss`. Only ``loss`` carries a gradient."""

    loss: Tensor
    policy_loss: Tensor
    kl: Tensor
    log_prob: Tensor
    ratio: Tensor
    clip_fraction: Tensor


def grpo_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    coef: SDECoefficients,
    clip_range: float | tuple[float, float] = 1e-4,
    adv_clip: float = 5.0,
    gate: Tensor | None = None,
    ref_velocity: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_reduction: str | None = None,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    backend: str | None = None,
    reduction: str = "mean",
    noise: Tensor | None = None,
) -> GRPOLoss:
    """Clipped policy loss plus ``kl_coef`` times the gated KL::

        A      = clamp(advantage, -adv_clip, adv_clip)
        r      = exp(log_prob - old_log_prob)
        policy = mean(max(-A*r, -A*clamp(r, 1-eps_low, 1+eps_high)))
        loss   = policy + kl_coef * KL

    Args:
        velocity, sample, prev_sample: ``[B, ...]``, as in ``sde_log_prob``.
        old_log_prob: ``[B]`` from ``sde_step`` at sampling time.
        advantage: ``[B]``. A sample with advantage 0 adds nothing to the policy loss.
        coef: coefficients of the step(s), 0-d or ``[B]`` fields.
        clip_range: epsilon, or ``(eps_low, eps_high)``.
        adv_clip: advantages are clamped to ``[-adv_clip, adv_clip]``.
        gate: bool ``[B]``, the samples with a KL penalty; None means all of them.
        ref_velocity: ``[B, ...]`` velocity of the reference policy (after guidance, if any). Rows
            outside the gate may hold anything. Without it there is no KL.
        kl_coef: weight of the KL; a non-zero weight needs ``ref_velocity``.
        kl_reduction: ``gated`` (None): mean over the gated samples; ``batch``: their sum over B.
            Both are 0 with no gradient when no sample is gated.
        velocity_uncond, guidance_scale: classifier-free guidance, as in ``sde_step``.
        backend: None for the best available, or a name.
        reduction: ``mean`` as above; ``sum``: ``policy_loss`` is the sum over the samples and
            ``kl`` that over the gated ones, so that their weights are the caller's alone. Not
            together with ``kl_reduction``.
        noise: ``[B, ...]`` the ``z`` that sampling added. With it the ratio is GRPO-Guard's
            (RatioNorm, arXiv 2510.22319), whose spread is the same at every step:
            ``log r = mean(z*(m - m_old))``, ``m = a*x + b*v``, ``m_old = prev_sample - c*z``. It is
            1 on policy up to rounding. ``old_log_prob`` is not read then.

    Returns:
        0-d ``loss``, ``policy_loss``, ``kl`` (without ``kl_coef``) and ``clip_fraction`` (share of
        ratios outside the clip range), ``[B]`` ``log_prob`` and ``ratio``; float32, or float64 if
        the latents or ``coef`` are. ``loss`` is differentiable in ``velocity`` and
        ``velocity_uncond`` only. For equal velocities ``ratio`` is exactly 1. An empty batch has
        loss 0.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype, device or value, or coefficients of kind
            ``ode``, which have no density.
        BackendUnavailable: the backend asked for cannot run here.
    """
    check_velocities(velocity, sample, coef, velocity_uncond, guidance_scale)
    check_density(coef)
    batch, device = velocity.shape[0], velocity.device
    checks.latents("prev_sample", prev_sample, like=velocity)
    checks.per_sample("old_log_prob", old_log_prob, batch, device)
    checks.per_sample("advantage", advantage, batch, device)
    eps = _clip_bounds(clip_range)
    checks.number("adv_clip", adv_clip, low=0.0, exclusive_low=True)
    check_kl(velocity, gate, ref_velocity, kl_coef)
    if checks.choice("reduction", reduction, _REDUCTIONS) == "mean":
        reduction = checks.choice("kl_reduction", kl_reduction or "gated", _KL_REDUCTIONS)
    elif kl_reduction is not None:
        raise ValueError(
            f"kl_reduction: expected None with reduction 'sum', which weighs nothing, "
            f"got {kl_reduction!r}"
        )
    if noise is not None:
        checks.latents("noise", noise, like=velocity)
    dtype = checks.compute_dtype(
        velocity, sample, prev_sample, velocity_uncond, ref_velocity, coef.a, noise
    )
    chosen = backends.select("grpo_loss", backend, device, dtype, BACKENDS)
    operands: tuple[Any, ...] = (
        velocity,
        sample,
        prev_sample,
        old_log_prob,
        advantage,
        coef if chosen == "reference" else coef.operands(),
        *eps,
        float(adv_clip),
        gate,
        ref_velocity,
        float(kl_coef),
        reduction,
        noise,
        velocity_uncond,
        float(guidance_scale),
    )
    if chosen == "reference":
        loss, *rest = reference.grpo_loss(*ordinary((*operands, dtype)))
        return GRPOLoss(loss, *(value.detach() for value in rest))
    loss, stats, log_prob, ratio, _, _ = fused.grpo_loss(chosen, *operands)
    policy_loss, kl, clip_fraction = stats.unbind()
    return GRPOLoss(loss, policy_loss, kl, log_prob, ratio, clip_fraction)


def check_kl(
    velocity: Tensor, gate: Tensor | None, ref_velocity: Tensor | None, kl_coef: float
) -> None:
    """Checks shared by the losses with a gated KL."""
    if gate is not None:
        checks.mask("gate", gate, velocity.shape[0], velocity.device)
    checks.number("kl_coef", kl_coef, low=0.0)
    if ref_velocity is not None:
        checks.latents("ref_velocity", ref_velocity, like=velocity)
    elif kl_coef != 0:
        raise ValueError(f"ref_velocity: expected a tensor for kl_coef {kl_coef}, got None")


def _clip_bounds(clip_range: Any) -> tuple[float, float]:
    """``(eps_low, eps_high)``."""
    if isinstance(clip_range, (tuple, list)):
        if len(clip_range) != 2:
            raise ValueError(
                f"clip_range: expected a number or (low, high), got {len(clip_range)} values"
            )
        low, high = clip_range
    else:
        low = high = clip_range
    return (
        checks.number("clip_range", low, low=0.0, high=1.0),
        checks.number("clip_range", high, low=0.0),
    )
