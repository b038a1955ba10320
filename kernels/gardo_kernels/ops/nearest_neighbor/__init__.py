"""Cosine distance to the nearest neighbour of the same group."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels import _backends, _checks
from gardo_kernels.ops.nearest_neighbor import faiss, reference

__all__ = ["nearest_neighbor_distance"]

_BACKENDS: dict[str, _backends.Availability] = {
    "reference": _backends.always,
    "faiss": faiss.unavailable,
}


def nearest_neighbor_distance(
    features: Tensor, group_ids: Tensor, backend: str | None = None
) -> Tensor:
    """``1 - cosine similarity`` to the nearest *other* member of the sample's group.

    Args:
        features: ``[N, D]`` floating, of any length (they are normalised here). A zero row is at
            distance 1 from everything; a row with a NaN has distance NaN and is no one's
            neighbour.
        group_ids: int64 ``[N]`` in any order.
        backend: None for the best available, or a name; ``faiss`` for very large groups.

    Returns:
        ``[N]`` in ``[0, 2]``, 0 for a singleton; float64 for float64 features, else float32.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or device.
        BackendUnavailable: the backend asked for cannot run here.
    """
    _checks.floating("features", features)
    if features.dim() != 2:
        raise ValueError(f"features: expected shape [N, D], got {list(features.shape)}")
    if features.shape[0] > 0 and features.shape[1] == 0:
        raise ValueError(f"features: expected D >= 1, got shape {list(features.shape)}")
    _checks.group_ids(group_ids, features.shape[0], features.device)
    chosen = _backends.select("nearest_neighbor_distance", backend, features.device, _BACKENDS)
    run = faiss if chosen == "faiss" else reference
    with torch.no_grad():
        distance = run.nearest_neighbor_distance(features.detach(), group_ids)
    return distance.to(_checks.compute_dtype(features))
