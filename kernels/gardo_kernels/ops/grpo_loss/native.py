"""CPU kernels of the GRPO loss (see ``_native`` and ``csrc``), in the signature of ``fused``."""

from __future__ import annotations

from torch import Tensor

from gardo_kernels import _native


def grpo_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    offset: Tensor,
    kl: Tensor,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    gate: Tensor | None,
    ref_velocity: Tensor | None,
    kl_coef: float,
    kl_reduction: str,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``loss, stats [3] (policy_loss, kl, clip_fraction), log_prob, ratio, alpha, beta``."""
    return _native.grpo_loss(
        velocity.contiguous(),
        sample.contiguous(),
        prev_sample.contiguous(),
        _native.as_float32(old_log_prob),
        _native.as_float32(advantage),
        a,
        b,
        scale,
        offset,
        kl,
        1.0 - clip_low,
        1.0 + clip_high,
        adv_clip,
        None if gate is None else gate.contiguous(),
        None if ref_velocity is None else ref_velocity.contiguous(),
        kl_coef,
        kl_reduction,
        None if velocity_uncond is None else velocity_uncond.contiguous(),
        guidance_scale,
    )
