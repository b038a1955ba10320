"""Cosine distance to the nearest neighbour of the same group."""

from __future__ import annotations

from torch import Tensor

from gardo_kernels import backends, checks
from gardo_kernels.operators import operator
from gardo_kernels.ops.nearest_neighbor import faiss, native

__all__ = ["nearest_neighbor_distance"]

#: Backends by name, best first: the files of this folder.
BACKENDS = backends.discover(__name__, __path__)

_distance = operator(
    native.nearest_neighbor_distance,
    lambda features, _: features.new_empty(features.shape[0], dtype=checks.compute_dtype(features)),
)


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
    checks.floating("features", features)
    if features.dim() != 2:
        raise ValueError(f"features: expected shape [N, D], got {list(features.shape)}")
    if features.shape[0] > 0 and features.shape[1] == 0:
        raise ValueError(f"features: expected D >= 1, got shape {list(features.shape)}")
    checks.group_ids(group_ids, features.shape[0], features.device)
    dtype = checks.compute_dtype(features)
    chosen = backends.select("nearest_neighbor_distance", backend, features.device, dtype, BACKENDS)
    if backend is None and chosen == "native" and faiss.unavailable(features.device, dtype) is None:
        chosen = "by_size"
    distance: Tensor = _distance(chosen, features, group_ids)
    return distance
