"""Device functions and launch helpers shared by the Triton backends.

Imported only when a Triton backend runs, so that the package works without Triton.

Sampling and training must give the same log-probability bit for bit. Compilers may contract a*b+c
to one rounding, and a block-wide ``tl.sum`` adds in the order of the layout it was compiled with,
which differs between kernels. So the arithmetic of the log-probability fixes both: products that
are added are written as ``fma``, and squares are summed lane by lane over a row's tiles and then by
an explicit binary tree.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
_MAX_TILE = 1024
_MIN_TILE = 128
_TILES = 4
_TILES_LONG = 16
_LONG_ROW = 1 << 20
_MAX_WIDTH = 64
# The last pass of a loss is one program: rows per step of its loop, and its warps. Chosen so that
# no architecture spills (see aot).
FINAL_ROWS = 16
FINAL_WARPS = 8


class Tiling(NamedTuple):
    """How rows of ``n`` elements are cut: a function of ``n`` alone, as the sums' order is."""

    n: int
    tile: int  # elements per tile
    tiles: int  # tiles per program
    programs: int  # programs per row
    width: int  # partial sums per row that the last pass adds at once


def tiling(n: int) -> Tiling:
    """Cut rows of ``n`` elements."""
    tile = min(_MAX_TILE, max(_MIN_TILE, triton.next_power_of_2(n)))
    tiles = min(_TILES_LONG if n > _LONG_ROW else _TILES, max(1, triton.cdiv(n, tile)))
    programs = max(1, triton.cdiv(n, tile * tiles))
    return Tiling(n, tile, tiles, programs, min(_MAX_WIDTH, triton.next_power_of_2(programs)))


def row_length(value: Tensor) -> int:
    """Elements per row of ``[B, ...]``."""
    return math.prod(value.shape[1:])


def dense_rows(value: Tensor) -> Tensor:
    """``value`` if each of its rows is dense, else a contiguous copy. Batch strides may be any."""
    if value.shape[0] == 0 or value[0].is_contiguous():
        return value
    return value.contiguous()


def optional_rows(value: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """A row operand and its batch stride; an absent one is a stand-in that is never read."""
    if value is None:
        return stand_in, 0
    value = dense_rows(value)
    return value, value.stride(0)


def stride_of(value: Tensor) -> int:
    """Stride of a ``[B]`` operand; 0 for a 0-d one, which serves every row."""
    return 0 if value.dim() == 0 else value.stride(0)


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    *args: Any,
    num_warps: int = NUM_WARPS,
    **meta: Any,
) -> None:
    """Launch ``programs`` programs on the device of the operands (not the current one)."""
    if programs == 0:
        return
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[(programs,)](*args, num_warps=num_warps, **meta)
    else:
        kernel[(programs,)](*args, num_warps=num_warps, **meta)


@triton.jit
def tree_sum(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sum over the last dimension of ``[ROWS, WIDTH]`` by a binary tree over neighbours."""
    if WIDTH == 1:
        return tl.reshape(x, (ROWS,))
    else:
        left, right = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
        return tree_sum(left + right, ROWS, WIDTH // 2)


@triton.jit
def row_and_start(PROGRAMS, TILE: tl.constexpr, TILES: tl.constexpr):
    """Row of this program and its first element, as int64: offsets may pass 2^31."""
    program = tl.program_id(0).to(tl.int64)
    row = program // PROGRAMS
    return row, (program - row * PROGRAMS) * (TILE * TILES)


@triton.jit
def load(pointer, offset, mask):
    """A masked load in float32; 0 outside."""
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_velocity(v_ptr, v_row, u_ptr, u_row, offset, mask, guidance, HAS_UNCOND: tl.constexpr):
    """The velocity after classifier-free guidance."""
    v = load(v_ptr + v_row, offset, mask)
    if HAS_UNCOND:
        u = load(u_ptr + u_row, offset, mask)
        v = tl.fma(v - u, tl.zeros_like(v) + guidance, u)
    return v


@triton.jit
def transition_mean(v, x, a, b):
    """``a*x + b*v``, with one rounding in the sum."""
    return tl.fma(v, tl.zeros_like(v) + b, x * a)


@triton.jit
def row_totals(partial_ptr, rows, row_mask, PROGRAMS, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Totals of the partial sums ``[B, PROGRAMS]`` of ``rows``, in an order fixed per row."""
    column = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for start in range(0, PROGRAMS, WIDTH):
        inside = row_mask[:, None] & (start + column < PROGRAMS)[None, :]
        offset = rows[:, None] * PROGRAMS + (start + column)[None, :]
        total += tl.load(partial_ptr + offset, mask=inside, other=0.0)
    return tree_sum(total, ROWS, WIDTH)


@triton.jit
def log_prob_from(total, inverse_n, scale, offset):
    """``offset - scale * total / n``."""
    return tl.fma(-scale, total * inverse_n, offset)
