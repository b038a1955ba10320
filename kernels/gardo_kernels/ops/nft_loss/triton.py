"""Triton backend of the DiffusionNFT loss: one reduction pass, one tiny kernel, one backward pass.

With ``e+`` and ``e-`` the errors of the two implicit predictions, the gradient by the velocity is
``P*e+ + Q*e- + K*(v - v_ref)`` with one weight of each kind per row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels import triton_helpers as common
from gardo_kernels.triton_helpers import load, row_and_start

_SUMS = 5  # |e+|, e+^2, |e-|, e-^2, (v - v_ref)^2
_WEIGHT_FLOOR = tl.constexpr(1e-5)


@triton.jit
def _errors(v, v_old, x0, xt, t, beta):
    positive = xt - t * (beta * v + (1.0 - beta) * v_old) - x0
    negative = xt - t * ((1.0 + beta) * v_old - beta * v) - x0
    return positive, negative


@triton.jit
def _sums_kernel(
    v_ptr, v_stride, old_ptr, old_stride, x0_ptr, x0_stride, xt_ptr, xt_stride,
    ref_ptr, ref_stride, gate_ptr, t_ptr, t_stride, partial_ptr, n, programs, count, beta,
    HAS_REF: tl.constexpr, HAS_GATE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row, start = row_and_start(programs, TILE, TILES)
    t = tl.load(t_ptr + row * t_stride).to(tl.float32)
    gated = True
    if HAS_GATE:
        gated = tl.load(gate_ptr + row) != 0
    lane = tl.arange(0, TILE)
    abs_positive = tl.zeros((TILE,), dtype=tl.float32)
    sq_positive = tl.zeros((TILE,), dtype=tl.float32)
    abs_negative = tl.zeros((TILE,), dtype=tl.float32)
    sq_negative = tl.zeros((TILE,), dtype=tl.float32)
    sq_kl = tl.zeros((TILE,), dtype=tl.float32)
    for tile in range(TILES):
        offset = start + tile * TILE + lane
        mask = offset < n
        v = load(v_ptr + row * v_stride, offset, mask)
        v_old = load(old_ptr + row * old_stride, offset, mask)
        x0 = load(x0_ptr + row * x0_stride, offset, mask)
        xt = load(xt_ptr + row * xt_stride, offset, mask)
        positive, negative = _errors(v, v_old, x0, xt, t, beta)
        positive = tl.where(mask, positive, 0.0)
        negative = tl.where(mask, negative, 0.0)
        abs_positive += tl.abs(positive)
        sq_positive += positive * positive
        abs_negative += tl.abs(negative)
        sq_negative += negative * negative
        if HAS_REF:
            wanted = mask & gated
            difference = tl.where(wanted, v - load(ref_ptr + row * ref_stride, offset, wanted), 0.0)
            sq_kl += difference * difference
    # partial is [5, B, programs]
    out = partial_ptr + tl.program_id(0)
    tl.store(out, tl.sum(abs_positive, axis=0))
    tl.store(out + count, tl.sum(sq_positive, axis=0))
    tl.store(out + 2 * count, tl.sum(abs_negative, axis=0))
    tl.store(out + 3 * count, tl.sum(sq_negative, axis=0))
    tl.store(out + 4 * count, tl.sum(sq_kl, axis=0))


@triton.jit
def _finish_kernel(
    partial_ptr, advantage_ptr, advantage_stride, gate_ptr, t_ptr, t_stride,
    loss_ptr, stats_ptr, weights_ptr,
    batch, policy_rows, programs, count, inverse_n, beta, adv_clip, kl_coef,
    HAS_REF: tl.constexpr, HAS_GATE: tl.constexpr, PER_ROW: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, ROWS)
    kl_rows = policy_rows
    if HAS_GATE and PER_ROW:
        gated_count = tl.zeros((ROWS,), dtype=tl.float32)
        for first in range(0, batch, ROWS):
            gate = tl.load(gate_ptr + first + lane, mask=first + lane < batch, other=0)
            gated_count += (gate != 0).to(tl.float32)
        kl_rows = tl.maximum(tl.sum(gated_count, axis=0), 1.0)
    policy_sum = tl.zeros((ROWS,), dtype=tl.float32)
    kl_sum = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, batch, ROWS):
        rows = (first + lane).to(tl.int64)
        inside = rows < batch
        advantage = tl.load(advantage_ptr + rows * advantage_stride, mask=inside, other=0.0)
        share = advantage.to(tl.float32) / (2.0 * adv_clip) + 0.5
        share = tl.where(share < 0.0, 0.0, tl.where(share > 1.0, 1.0, share))  # NaN stays NaN
        t = tl.load(t_ptr + rows * t_stride, mask=inside, other=0.0).to(tl.float32)
        mean_abs = _row_mean(partial_ptr, rows, inside, programs, inverse_n, ROWS, WIDTH)
        weight = tl.maximum(mean_abs, _WEIGHT_FLOOR)
        square = _row_mean(partial_ptr + count, rows, inside, programs, inverse_n, ROWS, WIDTH)
        l_positive, factor_positive = square / weight, share / weight
        mean_abs = _row_mean(
            partial_ptr + 2 * count, rows, inside, programs, inverse_n, ROWS, WIDTH
        )
        weight = tl.maximum(mean_abs, _WEIGHT_FLOOR)
        square = _row_mean(partial_ptr + 3 * count, rows, inside, programs, inverse_n, ROWS, WIDTH)
        l_negative, factor_negative = square / weight, (1.0 - share) / weight
        policy = adv_clip * (share * l_positive + (1.0 - share) * l_negative) / beta
        policy_sum += tl.where(inside, policy, 0.0)
        # d l/d v: 2/n * error/weight * (-+ t*beta); the beta cancels that of the loss.
        slope = 2.0 * inverse_n * adv_clip * t / policy_rows
        tl.store(weights_ptr + rows, -slope * factor_positive, mask=inside)
        tl.store(weights_ptr + batch + rows, slope * factor_negative, mask=inside)
        if HAS_REF:
            counted = inside
            if HAS_GATE:
                counted = inside & (tl.load(gate_ptr + rows, mask=inside, other=0) != 0)
            square = _row_mean(
                partial_ptr + 4 * count, rows, inside, programs, inverse_n, ROWS, WIDTH
            )
            kl_sum += tl.where(counted, square, 0.0)
            kl_weight = kl_coef * 2.0 * inverse_n / kl_rows
            tl.store(weights_ptr + 2 * batch + rows, tl.where(counted, kl_weight, 0.0), mask=inside)
        else:
            tl.store(weights_ptr + 2 * batch + rows, tl.zeros_like(policy), mask=inside)
    policy_loss = tl.sum(policy_sum, axis=0) / policy_rows
    kl = tl.sum(kl_sum, axis=0) / kl_rows
    tl.store(loss_ptr, policy_loss + kl_coef * kl)
    tl.store(stats_ptr, policy_loss)
    tl.store(stats_ptr + 1, kl)


@triton.jit
def _row_mean(
    partial_ptr, rows, row_mask, programs, inverse_n, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    return common.row_totals(partial_ptr, rows, row_mask, programs, ROWS, WIDTH) * inverse_n


@triton.jit
def _grad_kernel(
    v_ptr, v_stride, old_ptr, old_stride, x0_ptr, x0_stride, xt_ptr, xt_stride,
    ref_ptr, ref_stride, t_ptr, t_stride, weights_ptr, grad_ptr, grad_v_ptr,
    batch, n, programs, beta,
    HAS_REF: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row, start = row_and_start(programs, TILE, TILES)
    t = tl.load(t_ptr + row * t_stride).to(tl.float32)
    upstream = tl.load(grad_ptr).to(tl.float32)
    weight_positive = tl.load(weights_ptr + row) * upstream
    weight_negative = tl.load(weights_ptr + batch + row) * upstream
    weight_kl = tl.zeros((TILE,), dtype=tl.float32)
    if HAS_REF:
        weight_kl += tl.load(weights_ptr + 2 * batch + row) * upstream
    lane = tl.arange(0, TILE)
    for tile in range(TILES):
        offset = start + tile * TILE + lane
        mask = offset < n
        v = load(v_ptr + row * v_stride, offset, mask)
        v_old = load(old_ptr + row * old_stride, offset, mask)
        x0 = load(x0_ptr + row * x0_stride, offset, mask)
        xt = load(xt_ptr + row * xt_stride, offset, mask)
        positive, negative = _errors(v, v_old, x0, xt, t, beta)
        grad = weight_positive * positive + weight_negative * negative
        if HAS_REF:
            wanted = mask & (weight_kl != 0)
            difference = v - load(ref_ptr + row * ref_stride, offset, wanted)
            grad += tl.where(wanted, weight_kl * difference, 0.0)
        tl.store(grad_v_ptr + row * n + offset, grad, mask=mask)


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
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss``, ``stats [2]`` (policy_loss, kl), ``weights [3, B]`` of the gradient."""
    batch, device = velocity.shape[0], velocity.device
    new = torch.zeros if batch == 0 else torch.empty
    loss, stats, weights = (
        new(shape, dtype=torch.float32, device=device) for shape in ((), (2,), (3, batch))
    )
    if batch == 0:
        return loss, stats, weights
    cut = common.tiling(common.row_length(velocity))
    v, v_old, clean, noisy = (common.dense_rows(x) for x in (velocity, old_velocity, x0, xt))
    ref, ref_stride = common.optional_rows(ref_velocity, v)
    mask = advantage if gate is None else gate.contiguous().view(torch.uint8)
    count = batch * cut.programs
    partial = torch.empty(_SUMS, batch, cut.programs, dtype=torch.float32, device=device)
    common.launch(
        _sums_kernel,
        count,
        device,
        *(v, v.stride(0), v_old, v_old.stride(0), clean, clean.stride(0), noisy, noisy.stride(0)),
        *(ref, ref_stride, mask, t, common.stride_of(t), partial, cut.n, cut.programs, count, beta),
        HAS_REF=ref_velocity is not None,
        HAS_GATE=gate is not None,
        TILE=cut.tile,
        TILES=cut.tiles,
    )
    common.launch(
        _finish_kernel,
        1,
        device,
        *(partial, advantage, advantage.stride(0), mask, t, common.stride_of(t)),
        *(
            loss,
            stats,
            weights,
            batch,
            float(batch) if reduction == "mean" else 1.0,
            cut.programs,
            count,
            1.0 / cut.n,
        ),
        *(beta, adv_clip, kl_coef),
        HAS_REF=ref_velocity is not None,
        HAS_GATE=gate is not None,
        PER_ROW=reduction == "mean",
        ROWS=common.FINAL_ROWS,
        WIDTH=cut.width,
        num_warps=common.FINAL_WARPS,
    )
    return loss, stats, weights


def nft_grad(
    velocity: Tensor,
    old_velocity: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    grad: Tensor,
    weights: Tensor,
    beta: float,
    ref_velocity: Tensor | None,
) -> Tensor:
    """Gradient of the loss by ``velocity``, times the 0-d ``grad``."""
    batch, cut = velocity.shape[0], common.tiling(common.row_length(velocity))
    v, v_old, clean, noisy = (common.dense_rows(x) for x in (velocity, old_velocity, x0, xt))
    ref, ref_stride = common.optional_rows(ref_velocity, v)
    grad_v = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    common.launch(
        _grad_kernel,
        batch * cut.programs,
        velocity.device,
        *(v, v.stride(0), v_old, v_old.stride(0), clean, clean.stride(0), noisy, noisy.stride(0)),
        *(ref, ref_stride, t, common.stride_of(t), weights, grad, grad_v),
        *(batch, cut.n, cut.programs, beta),
        HAS_REF=ref_velocity is not None,
        TILE=cut.tile,
        TILES=cut.tiles,
    )
    return grad_v


def call_every_form(dtype: torch.dtype) -> None:
    """Launch the kernels in every form that they are compiled in (see ``aot``)."""
    v = torch.zeros(4, 16, 64, 64, dtype=dtype)
    x, row, scalar = torch.zeros(v.shape), torch.zeros(4), torch.zeros(())
    for ref in (None, v):
        for gate in (None, torch.zeros(4, dtype=torch.bool)):
            nft_loss(v, v, x, x, row, row, 1.0, 5.0, gate, ref, 0.04, "mean")
        nft_grad(v, v, x, x, row, scalar, torch.zeros(3, 4), 1.0, ref)
