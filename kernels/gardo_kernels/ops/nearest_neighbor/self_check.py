"""Distances of an epoch of 48 prompts of 24 images, for ``python -m gardo_kernels``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import gardo_kernels as gk


def checks(
    normal: Callable[..., Tensor],
) -> dict[str, Callable[[str, torch.dtype], tuple[Tensor, ...]]]:
    """By the name of the op, what gives its outputs for a backend and a dtype."""
    features = normal(1152, 1024)
    ids = torch.arange(1152, device=features.device) % 48

    def distance(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (gk.nearest_neighbor_distance(features, ids, backend=backend),)

    return {"nearest_neighbor_distance": distance}
