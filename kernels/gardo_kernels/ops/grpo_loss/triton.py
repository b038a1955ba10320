"""Triton backend of the GRPO loss: one pass over the latents, one tiny kernel for the rest."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels import triton_helpers as common
from gardo_kernels.ops.sde.triton import residual_sums
from gardo_kernels.triton_helpers import log_prob_from, row_totals


@triton.jit
def _finish_kernel(
    partial_ptr, partial_kl_ptr, partial_shift_ptr,
    old_ptr, old_stride, advantage_ptr, advantage_stride, gate_ptr,
    b_ptr, b_stride, scale_ptr, scale_stride, offset_ptr, offset_stride, kl_ptr, kl_stride,
    loss_ptr, stats_ptr, log_prob_ptr, ratio_ptr, alpha_ptr, beta_ptr,
    batch, rows_in_batch, policy_rows, kl_rows, programs, inverse_n, adv_clip, low, high, kl_coef,
    HAS_REF: tl.constexpr, HAS_GATE: tl.constexpr, HAS_NOISE: tl.constexpr, PER_GATED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """From partial sums to the loss and to the weights ``alpha``, ``beta`` of its gradient."""
    lane = tl.arange(0, ROWS)
    if HAS_GATE and PER_GATED:
        gated_count = tl.zeros((ROWS,), dtype=tl.float32)
        for first in range(0, batch, ROWS):
            gate = tl.load(gate_ptr + first + lane, mask=first + lane < batch, other=0)
            gated_count += (gate != 0).to(tl.float32)
        kl_rows = tl.maximum(tl.sum(gated_count, axis=0), 1.0)
    policy_sum = tl.zeros((ROWS,), dtype=tl.float32)
    clipped_sum = tl.zeros((ROWS,), dtype=tl.float32)
    kl_sum = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, batch, ROWS):
        rows = (first + lane).to(tl.int64)
        inside = rows < batch
        scale = tl.load(scale_ptr + rows * scale_stride, mask=inside, other=0.0)
        offset = tl.load(offset_ptr + rows * offset_stride, mask=inside, other=0.0)
        b = tl.load(b_ptr + rows * b_stride, mask=inside, other=0.0)
        total = row_totals(partial_ptr, rows, inside, programs, ROWS, WIDTH)
        log_prob = log_prob_from(total, inverse_n, scale, offset)
        old = tl.load(old_ptr + rows * old_stride, mask=inside, other=0.0).to(tl.float32)
        advantage = tl.load(advantage_ptr + rows * advantage_stride, mask=inside, other=0.0)
        advantage = advantage.to(tl.float32)
        advantage = tl.where(advantage > adv_clip, adv_clip, advantage)  # NaN stays NaN
        advantage = tl.where(advantage < -adv_clip, -adv_clip, advantage)
        log_ratio = log_prob - old
        slope = 2.0 * inverse_n * scale * b
        if HAS_NOISE:
            log_ratio = (
                row_totals(partial_shift_ptr, rows, inside, programs, ROWS, WIDTH) * inverse_n
            )
            slope = inverse_n * b
        ratio = tl.exp(log_ratio)
        bounded = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        plain, bound = -advantage * ratio, -advantage * bounded
        idle = advantage == 0
        active = (plain >= bound) & (advantage != 0)
        policy = tl.where(active, plain, tl.where(idle, 0.0, bound))
        policy_sum += tl.where(inside, policy, 0.0)
        clipped_sum += ((ratio < low) | (ratio > high)).to(tl.float32) * inside.to(tl.float32)
        alpha = tl.where(active, plain / policy_rows * slope, 0.0)
        tl.store(log_prob_ptr + rows, log_prob, mask=inside)
        tl.store(ratio_ptr + rows, ratio, mask=inside)
        tl.store(alpha_ptr + rows, alpha, mask=inside)
        if HAS_REF:
            counted = inside
            if HAS_GATE:
                counted = inside & (tl.load(gate_ptr + rows, mask=inside, other=0) != 0)
            weight = tl.load(kl_ptr + rows * kl_stride, mask=counted, other=0.0)
            square = row_totals(partial_kl_ptr, rows, inside, programs, ROWS, WIDTH) * inverse_n
            kl_sum += tl.where(counted, weight * square, 0.0)
            beta = kl_coef * weight * (2.0 * inverse_n) / kl_rows
            tl.store(beta_ptr + rows, tl.where(counted, beta, 0.0), mask=inside)
        else:
            tl.store(beta_ptr + rows, tl.zeros_like(alpha), mask=inside)
    policy_loss = tl.sum(policy_sum, axis=0) / policy_rows
    kl = tl.sum(kl_sum, axis=0) / kl_rows
    tl.store(loss_ptr, policy_loss + kl_coef * kl)
    tl.store(stats_ptr, policy_loss)
    tl.store(stats_ptr + 1, kl)
    tl.store(stats_ptr + 2, tl.sum(clipped_sum, axis=0) / rows_in_batch)


def grpo_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    coef: Sequence[Tensor],
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    gate: Tensor | None,
    ref_velocity: Tensor | None,
    kl_coef: float,
    reduction: str,
    noise: Tensor | None,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``loss, stats [3] (policy_loss, kl, clip_fraction), log_prob, ratio, alpha, beta``."""
    batch, device = velocity.shape[0], velocity.device
    shapes: list[tuple[int, ...]] = [(), (3,), (batch,), (batch,), (batch,), (batch,)]
    new = torch.zeros if batch == 0 else torch.empty
    loss, stats, log_prob, ratio, alpha, beta = (
        new(shape, dtype=torch.float32, device=device) for shape in shapes
    )
    if batch == 0:
        return loss, stats, log_prob, ratio, alpha, beta
    partial, partial_kl, partial_shift, cut = residual_sums(
        *(velocity, sample, prev_sample, coef, velocity_uncond, guidance_scale),
        *(gate, ref_velocity, noise),
    )
    policy_rows = 1.0 if reduction == "sum" else float(batch)
    _, b, _, scale, offset, kl = coef
    strided = (
        *(b, common.stride_of(b), scale, common.stride_of(scale)),
        *(offset, common.stride_of(offset), kl, common.stride_of(kl)),
    )
    common.launch(
        _finish_kernel,
        1,
        device,
        *(partial, partial_kl, partial_shift, old_log_prob, old_log_prob.stride(0)),
        *(advantage, advantage.stride(0)),
        advantage if gate is None else gate.contiguous().view(torch.uint8),
        *strided,
        *(loss, stats, log_prob, ratio, alpha, beta),
        *(batch, float(batch), policy_rows, policy_rows, cut.programs, 1.0 / cut.n),
        *(adv_clip, 1.0 - clip_low, 1.0 + clip_high, kl_coef),
        HAS_REF=ref_velocity is not None,
        HAS_GATE=gate is not None,
        HAS_NOISE=noise is not None,
        PER_GATED=reduction == "gated",
        ROWS=common.FINAL_ROWS,
        WIDTH=cut.width,
        num_warps=common.FINAL_WARPS,
    )
    return loss, stats, log_prob, ratio, alpha, beta


def call_every_form(dtype: torch.dtype) -> None:
    """Launch the kernels in every form that they are compiled in (see ``aot``)."""
    v = torch.zeros(4, 16, 64, 64, dtype=dtype)
    x, row, coef = torch.zeros(v.shape), torch.zeros(4), [torch.zeros(())] * 6
    for uncond in (None, v):
        for ref in (None, v):
            for gate in (None, torch.zeros(4, dtype=torch.bool)):
                step, clip = (v, x, x, row, row, coef), (1e-4, 1e-4, 5.0)
                for noise in (None, x):
                    grpo_loss(*step, *clip, gate, ref, 0.04, "gated", noise, uncond, 4.5)
