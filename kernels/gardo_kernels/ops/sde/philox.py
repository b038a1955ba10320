"""Counter-based noise that every backend draws alike.

Element ``e`` of row ``b`` takes lane ``e % 4`` of Philox4x32-10 (Salmon et al., SC 2011) with key
``(seed low, seed high)`` and counter ``(q low, q high, b low, b high)``, ``q = e // 4``. Lanes 0,1
and lanes 2,3 are turned into normals by Box-Muller. The noise of a row therefore depends on the
seed and on the row's index, not on the batch size, the device or the block size of a kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_normal(seed: Tensor, shape: torch.Size) -> Tensor:
    """Standard normal float32 noise of ``shape`` (``[B, ...]``) on the device of ``seed``.

    ``seed`` is a one-element int64 tensor; its value is not read on the host.
    """
    batch = shape[0]
    n = math.prod(shape[1:])
    quads = -(-n // 4)
    q = torch.arange(quads, device=seed.device).expand(batch, quads)
    row = torch.arange(batch, device=seed.device)[:, None].expand(batch, quads)
    lanes = _philox4x32(seed.reshape(()), (q & _MASK, q >> 32, row & _MASK, row >> 32))
    first = _box_muller(lanes[0], lanes[1])
    second = _box_muller(lanes[2], lanes[3])
    noise = torch.stack([*first, *second], dim=-1).reshape(batch, quads * 4)
    return noise[:, :n].reshape(shape)


def _philox4x32(seed: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32x32-bit product, without leaving signed 64-bit range."""
    upper, lower = constant * (word >> 16), constant * (word & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    low = ((upper << 16) + lower) & _MASK
    return high, low


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals from two 32-bit words; half a unit keeps the logarithm finite."""
    u1 = (first.to(torch.float32) + 0.5) * 2.0**-32
    u2 = (second.to(torch.float32) + 0.5) * 2.0**-32
    radius = torch.sqrt(-2 * torch.log(u1))
    angle = (2 * math.pi) * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)
