"""Argument validation shared by every op: errors name the argument, what was expected, what came.

Checks look at types, shapes, dtypes and devices only. They never read tensor values on an
accelerator, because that would stall the stream in the middle of a training loop.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensor(name: str, value: Any) -> Tensor:
    """Require a torch tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def floating(name: str, value: Any) -> Tensor:
    """Require a floating point tensor (float32, float16, bfloat16 or float64)."""
    tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: expected dtype float32, float16, bfloat16 or float64, got {value.dtype}"
        )
    return value


def latents(name: str, value: Any, like: Tensor | None = None) -> Tensor:
    """Require a floating tensor ``[B, ...]``, of the shape and device of ``like`` if given."""
    floating(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name}: expected shape [B, ...], got a 0-d tensor")
    if like is None:
        if value.shape[0] > 0 and value.numel() == 0:
            raise ValueError(
                f"{name}: expected at least one element per sample, got shape {list(value.shape)}"
            )
        return value
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)}, got {list(value.shape)}")
    return same_device(name, value, like.device)


def per_sample(name: str, value: Any, batch: int, device: torch.device) -> Tensor:
    """Require a floating tensor of shape ``[B]`` on ``device``."""
    floating(name, value)
    return shaped(name, value, (batch,), device)


def mask(name: str, value: Any, batch: int, device: torch.device) -> Tensor:
    """Require a bool tensor of shape ``[B]`` on ``device``."""
    tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected dtype torch.bool, got {value.dtype}")
    return shaped(name, value, (batch,), device)


def group_ids(value: Any, count: int, device: torch.device) -> Tensor:
    """Require int64 group ids of shape ``[N]`` on ``device``."""
    tensor("group_ids", value)
    if value.dtype != torch.int64:
        raise TypeError(f"group_ids: expected dtype torch.int64, got {value.dtype}")
    return shaped("group_ids", value, (count,), device)


def rewards(name: str, value: Any, dim: int, like: Tensor | None = None) -> Tensor:
    """Require floating rewards ``[N]`` or ``[K, N]``, of the N and the device of ``like``."""
    floating(name, value)
    count = "N" if like is None else like.shape[0]
    if value.dim() != dim or (like is not None and value.shape[-1] != count):
        shape = f"[{count}]" if dim == 1 else f"[K, {count}]"
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")
    return value if like is None else same_device(name, value, like.device)


def shaped(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Require an exact shape and device."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    return same_device(name, value, device)


def same_device(name: str, value: Tensor, device: torch.device) -> Tensor:
    """Require ``value`` on ``device``."""
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    return value


def number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    exclusive_low: bool = False,
) -> float:
    """Require a finite number in ``[low, high]`` (``(low, high]`` if ``exclusive_low``)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    number = float(value)
    inside = low < number <= high if exclusive_low else low <= number <= high
    if not (math.isfinite(number) and inside):
        bracket = "(" if exclusive_low else "["
        raise ValueError(
            f"{name}: expected a finite number in {bracket}{low}, {high}], got {value}"
        )
    return number


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Require one of ``allowed``."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(allowed)}, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def compute_dtype(*values: Tensor | None) -> torch.dtype:
    """float64 when any input is float64 (oracle runs), float32 otherwise."""
    for value in values:
        if value is not None and value.dtype == torch.float64:
            return torch.float64
    return torch.float32
