"""Tensors made in inference mode, as rollouts and reference passes make them, in losses.

Autograd refuses to save such tensors for the backward pass; copies made outside are ordinary ones.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


def ordinary(value: T) -> T:
    """A copy of a tensor made in inference mode where a gradient may need it, else the value.

    Tuples are mapped item by item, and coefficients, which are tables of tensors, by field.
    """
    if torch.compiler.is_compiling():
        return value  # tracing sees no inference mode
    return cast(T, _ordinary(value))


def _ordinary(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_ordinary, value))
    if hasattr(value, "map"):
        return value.map(_ordinary)
    if isinstance(value, Tensor) and torch.is_grad_enabled() and value.is_inference():
        return value.clone()
    return value
