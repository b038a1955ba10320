"""Triton kernels of the affine SDE step, its log-probability and the gradient by the velocity.

One pass over the latents leaves partial sums of squares; a second, tiny kernel turns them into
log-probabilities. ``sde_step`` and ``sde_log_prob`` share the arithmetic (see ``triton_helpers``).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels import triton_helpers as common
from gardo_kernels.triton_helpers import (
    load,
    load_velocity,
    log_prob_from,
    row_and_start,
    row_totals,
    transition_mean,
    tree_sum,
)

_NO_NOISE, _GIVEN_NOISE, _DRAWN_NOISE = 0, 1, 2


@triton.jit
def _cos_sin_of_turns(u):
    """Cosine and sine of ``u`` turns, ``0 <= u <= 1``, to 1e-7.

    The library functions carry a reduction for huge arguments that needs a stack.
    """
    quarter = tl.floor(4.0 * u + 0.5)
    angle = 6.283185307179586 * (u - 0.25 * quarter)  # within an eighth of a turn
    square = angle * angle
    sine = -1 / 5040 + square / 362880
    sine = angle * (1.0 + square * (-1 / 6 + square * (1 / 120 + square * sine)))
    cosine = -1 / 720 + square / 40320
    cosine = 1.0 + square * (-0.5 + square * (1 / 24 + square * cosine))
    quadrant = quarter.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    return (
        tl.where((quadrant == 1) | (quadrant == 2), -x, x),
        tl.where(quadrant >= 2, -y, y),
    )


@triton.jit
def _normal_pair(first, second):
    """Box-Muller on two 32-bit words."""
    u1 = (first.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u2 = (second.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    radius = tl.sqrt(-2.0 * tl.log(u1))
    cosine, sine = _cos_sin_of_turns(u2)
    return radius * cosine, radius * sine


@triton.jit
def philox_tile(seed, row, start, TILE: tl.constexpr):
    """Noise of elements ``start .. start+TILE`` of ``row`` (see philox.py for the definition)."""
    quad = start // 4 + tl.arange(0, TILE // 4).to(tl.int64)
    low = (quad & 0xFFFFFFFF).to(tl.uint32)
    high = (quad >> 32).to(tl.uint32)
    zero = low * 0
    row_low = zero + (row & 0xFFFFFFFF).to(tl.uint32)
    row_high = zero + (row >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, row_low, row_high)
    z0, z1 = _normal_pair(w0, w1)
    z2, z3 = _normal_pair(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def _step_kernel(
    v_ptr, v_stride, u_ptr, u_stride, x_ptr, x_stride, z_ptr, z_stride, seed_ptr,
    a_ptr, a_stride, b_ptr, b_stride, c_ptr, c_stride,
    prev_ptr, mean_ptr, partial_ptr, n, programs, guidance,
    HAS_UNCOND: tl.constexpr, NOISE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row, start = row_and_start(programs, TILE, TILES)
    a = tl.load(a_ptr + row * a_stride)
    b = tl.load(b_ptr + row * b_stride)
    c = tl.load(c_ptr + row * c_stride)
    lane = tl.arange(0, TILE)
    total = tl.zeros((TILE,), dtype=tl.float32)
    for tile in range(TILES):
        offset = start + tile * TILE + lane
        mask = offset < n
        v = load_velocity(
            v_ptr, row * v_stride, u_ptr, row * u_stride, offset, mask, guidance, HAS_UNCOND
        )
        x = load(x_ptr + row * x_stride, offset, mask)
        mean = transition_mean(v, x, a, b)
        prev = mean
        if NOISE == 1:
            z = load(z_ptr + row * z_stride, offset, mask)
            prev = tl.fma(z, tl.zeros_like(z) + c, mean)
        if NOISE == 2:
            z = philox_tile(tl.load(seed_ptr), row, start + tile * TILE, TILE)
            prev = tl.fma(z, tl.zeros_like(z) + c, mean)
        tl.store(prev_ptr + row * n + offset, prev, mask=mask)
        tl.store(mean_ptr + row * n + offset, mean, mask=mask)
        residual = tl.where(mask, prev - mean, 0.0)
        total = tl.fma(residual, residual, total)
    sums = tree_sum(tl.reshape(total, (1, TILE)), 1, TILE)
    tl.store(partial_ptr + tl.program_id(0) + tl.arange(0, 1), sums)


@triton.jit
def residual_kernel(
    v_ptr, v_stride, u_ptr, u_stride, x_ptr, x_stride, prev_ptr, prev_stride,
    ref_ptr, ref_stride, gate_ptr, z_ptr, z_stride,
    a_ptr, a_stride, b_ptr, b_stride, c_ptr, c_stride,
    partial_ptr, partial_kl_ptr, partial_shift_ptr, n, programs, guidance,
    HAS_UNCOND: tl.constexpr, HAS_REF: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_NOISE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Partial sums of ``(prev - mean)^2``; on gated rows, of ``(v - v_ref)^2``; with noise, of
    ``noise * (mean - (prev - c*noise))``."""
    row, start = row_and_start(programs, TILE, TILES)
    a = tl.load(a_ptr + row * a_stride)
    b = tl.load(b_ptr + row * b_stride)
    gated = True
    if HAS_GATE:
        gated = tl.load(gate_ptr + row) != 0
    lane = tl.arange(0, TILE)
    total = tl.zeros((TILE,), dtype=tl.float32)
    total_kl = tl.zeros((TILE,), dtype=tl.float32)
    total_shift = tl.zeros((TILE,), dtype=tl.float32)
    for tile in range(TILES):
        offset = start + tile * TILE + lane
        mask = offset < n
        v = load_velocity(
            v_ptr, row * v_stride, u_ptr, row * u_stride, offset, mask, guidance, HAS_UNCOND
        )
        x = load(x_ptr + row * x_stride, offset, mask)
        prev = load(prev_ptr + row * prev_stride, offset, mask)
        residual = tl.where(mask, prev - transition_mean(v, x, a, b), 0.0)
        total = tl.fma(residual, residual, total)
        if HAS_REF:
            wanted = mask & gated  # reference rows outside the gate are not even read
            difference = tl.where(wanted, v - load(ref_ptr + row * ref_stride, offset, wanted), 0.0)
            total_kl = tl.fma(difference, difference, total_kl)
        if HAS_NOISE:
            z = load(z_ptr + row * z_stride, offset, mask)
            total_shift += z * (z * tl.load(c_ptr + row * c_stride) - residual)
    sums = tree_sum(tl.reshape(total, (1, TILE)), 1, TILE)
    tl.store(partial_ptr + tl.program_id(0) + tl.arange(0, 1), sums)
    if HAS_REF:
        tl.store(partial_kl_ptr + tl.program_id(0), tl.sum(total_kl, axis=0))
    if HAS_NOISE:
        tl.store(partial_shift_ptr + tl.program_id(0), tl.sum(total_shift, axis=0))


@triton.jit
def _log_prob_kernel(
    partial_ptr, scale_ptr, scale_stride, offset_ptr, offset_stride, log_prob_ptr,
    batch, programs, inverse_n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < batch
    total = row_totals(partial_ptr, rows, row_mask, programs, ROWS, WIDTH)
    scale = tl.load(scale_ptr + rows * scale_stride, mask=row_mask, other=0.0)
    offset = tl.load(offset_ptr + rows * offset_stride, mask=row_mask, other=0.0)
    log_prob = log_prob_from(total, inverse_n, scale, offset)
    tl.store(log_prob_ptr + rows, log_prob, mask=row_mask)


@triton.jit
def _velocity_grad_kernel(
    v_ptr, v_stride, u_ptr, u_stride, x_ptr, x_stride, prev_ptr, prev_stride,
    ref_ptr, ref_stride,
    a_ptr, a_stride, b_ptr, b_stride, alpha_ptr, beta_ptr, grad_ptr, grad_stride,
    grad_v_ptr, grad_u_ptr, n, programs, guidance,
    HAS_UNCOND: tl.constexpr, HAS_REF: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row, start = row_and_start(programs, TILE, TILES)
    a = tl.load(a_ptr + row * a_stride)
    b = tl.load(b_ptr + row * b_stride)
    upstream = tl.load(grad_ptr + row * grad_stride).to(tl.float32)
    alpha = tl.zeros((TILE,), dtype=tl.float32) + tl.load(alpha_ptr + row) * upstream
    beta = tl.zeros((TILE,), dtype=tl.float32)
    if HAS_REF:
        beta += tl.load(beta_ptr + row) * upstream
    lane = tl.arange(0, TILE)
    for tile in range(TILES):
        offset = start + tile * TILE + lane
        mask = offset < n
        # Terms with weight 0 are not read: they may hold NaN, and most rows have no KL.
        with_policy = mask & (alpha != 0)
        with_kl = mask & (beta != 0)
        v = load_velocity(
            v_ptr, row * v_stride, u_ptr, row * u_stride, offset, with_policy | with_kl,
            guidance, HAS_UNCOND,
        )  # fmt: skip
        x = load(x_ptr + row * x_stride, offset, with_policy)
        prev = load(prev_ptr + row * prev_stride, offset, with_policy)
        residual = prev - transition_mean(v, x, a, b)
        grad = tl.where(with_policy, alpha * residual, 0.0)
        if HAS_REF:
            difference = v - load(ref_ptr + row * ref_stride, offset, with_kl)
            grad += tl.where(with_kl, beta * difference, 0.0)
        if HAS_UNCOND:
            tl.store(grad_u_ptr + row * n + offset, (1.0 - guidance) * grad, mask=mask)
            grad *= guidance
        tl.store(grad_v_ptr + row * n + offset, grad, mask=mask)


def sde_step(
    velocity: Tensor,
    sample: Tensor,
    coef: Sequence[Tensor],
    noise: Tensor | None,
    seed: Tensor | None,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``prev_sample, log_prob, mean``; without ``noise`` and ``seed`` no noise is added."""
    a, b, c, scale, offset, _ = coef
    batch, cut = velocity.shape[0], common.tiling(common.row_length(velocity))
    v, x = common.dense_rows(velocity), common.dense_rows(sample)
    u, u_stride = common.optional_rows(velocity_uncond, v)
    z, z_stride = common.optional_rows(noise, v)
    prev = torch.empty(velocity.shape, dtype=torch.float32, device=velocity.device)
    mean = torch.empty_like(prev)
    partial = torch.empty(batch, cut.programs, dtype=torch.float32, device=velocity.device)
    kind = _GIVEN_NOISE if noise is not None else _NO_NOISE if seed is None else _DRAWN_NOISE
    common.launch(
        _step_kernel,
        batch * cut.programs,
        velocity.device,
        *(v, v.stride(0), u, u_stride, x, x.stride(0), z, z_stride),
        v if seed is None else seed,
        *(a, common.stride_of(a), b, common.stride_of(b), c, common.stride_of(c)),
        *(prev, mean, partial, cut.n, cut.programs, guidance_scale),
        HAS_UNCOND=velocity_uncond is not None,
        NOISE=kind,
        TILE=cut.tile,
        TILES=cut.tiles,
    )
    return prev, _log_prob(partial, cut, scale, offset), mean


def sde_log_prob(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    coef: Sequence[Tensor],
    velocity_uncond: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """``log_prob [B]``."""
    _, _, _, scale, offset, _ = coef
    guided = (velocity_uncond, guidance_scale)
    partial, _, _, cut = residual_sums(velocity, sample, prev_sample, coef, *guided)
    return _log_prob(partial, cut, scale, offset)


def residual_sums(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    coef: Sequence[Tensor],
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    gate: Tensor | None = None,
    ref_velocity: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, common.Tiling]:
    """Partial sums ``[B, programs]`` of ``residual_kernel``."""
    a, b, c, *_ = coef
    batch, cut = velocity.shape[0], common.tiling(common.row_length(velocity))
    v, x, prev = (common.dense_rows(t) for t in (velocity, sample, prev_sample))
    u, u_stride = common.optional_rows(velocity_uncond, v)
    ref, ref_stride = common.optional_rows(ref_velocity, v)
    partial = torch.empty(batch, cut.programs, dtype=torch.float32, device=velocity.device)
    partial_kl = partial if ref_velocity is None else torch.empty_like(partial)
    partial_shift = partial if noise is None else torch.empty_like(partial)
    z, z_stride = common.optional_rows(noise, v)
    common.launch(
        residual_kernel,
        batch * cut.programs,
        velocity.device,
        *(v, v.stride(0), u, u_stride, x, x.stride(0), prev, prev.stride(0), ref, ref_stride),
        *(v if gate is None else gate.contiguous().view(torch.uint8), z, z_stride),
        *(a, common.stride_of(a), b, common.stride_of(b), c, common.stride_of(c)),
        *(partial, partial_kl, partial_shift, cut.n, cut.programs, guidance_scale),
        HAS_UNCOND=velocity_uncond is not None,
        HAS_REF=ref_velocity is not None,
        HAS_GATE=gate is not None,
        HAS_NOISE=noise is not None,
        TILE=cut.tile,
        TILES=cut.tiles,
    )
    return partial, partial_kl, partial_shift, cut


def velocity_grad(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    coef: Sequence[Tensor],
    grad: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    ref_velocity: Tensor | None,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    """``grad * (alpha*(prev - a*x - b*v) + beta*(v - v_ref))`` by both velocities.

    ``grad`` is 0-d or ``[B]``; ``alpha`` and ``beta`` are ``[B]`` float32. Without
    ``velocity_uncond`` the second result is empty.
    """
    a, b, *_ = coef
    batch, cut = velocity.shape[0], common.tiling(common.row_length(velocity))
    v, x, prev = (common.dense_rows(t) for t in (velocity, sample, prev_sample))
    u, u_stride = common.optional_rows(velocity_uncond, v)
    ref, ref_stride = common.optional_rows(ref_velocity, v)
    grad_v = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    grad_u = None
    if velocity_uncond is not None:
        grad_u = torch.empty(velocity.shape, dtype=velocity_uncond.dtype, device=velocity.device)
    common.launch(
        _velocity_grad_kernel,
        batch * cut.programs,
        velocity.device,
        *(v, v.stride(0), u, u_stride, x, x.stride(0), prev, prev.stride(0), ref, ref_stride),
        *(a, common.stride_of(a), b, common.stride_of(b)),
        *(alpha, alpha if beta is None else beta, grad, common.stride_of(grad)),
        *(grad_v, grad_v if grad_u is None else grad_u, cut.n, cut.programs, guidance_scale),
        HAS_UNCOND=velocity_uncond is not None,
        HAS_REF=ref_velocity is not None,
        TILE=cut.tile,
        TILES=cut.tiles,
    )
    return grad_v, torch.empty(0, device=velocity.device) if grad_u is None else grad_u


def _log_prob(partial: Tensor, cut: common.Tiling, scale: Tensor, offset: Tensor) -> Tensor:
    batch = partial.shape[0]
    log_prob = torch.empty(batch, dtype=torch.float32, device=partial.device)
    common.launch(
        _log_prob_kernel,
        triton.cdiv(batch, common.FINAL_ROWS),
        partial.device,
        *(partial, scale, common.stride_of(scale), offset, common.stride_of(offset), log_prob),
        *(batch, cut.programs, 1.0 / max(cut.n, 1)),
        ROWS=common.FINAL_ROWS,
        WIDTH=cut.width,
    )
    return log_prob


def call_every_form(dtype: torch.dtype) -> None:
    """Launch the kernels in every form that they are compiled in (see ``aot``)."""
    v = torch.zeros(4, 16, 64, 64, dtype=dtype)
    x, row, scalar = torch.zeros(v.shape), torch.zeros(4), torch.zeros(())
    seed, coef = torch.zeros(1, dtype=torch.int64), [scalar] * 6
    for uncond in (None, v):
        for noise, seeded in ((x, None), (None, seed), (None, None)):
            sde_step(v, x, coef, noise, seeded, uncond, 4.5)
        sde_log_prob(v, x, x, coef, uncond, 4.5)
        for ref in (None, v):
            velocity_grad(v, x, x, coef, scalar, row, row, ref, uncond, 4.5)
