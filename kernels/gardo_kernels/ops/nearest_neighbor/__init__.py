"""Cosine distance to the nearest neighbour of the same group."""

from __future__ import annotations

from torch import Tensor

from gardo_kernels import _backends, _checks, _native
from gardo_kernels._operators import kernels, operator
from gardo_kernels.ops.nearest_neighbor import faiss

__all__ = ["nearest_neighbor_distance"]

#: Backends by name, best first.
BACKENDS: dict[str, _backends.Availability] = {
    "native": _backends.native_cpu,
    "triton": _backends.triton,
    "reference": _backends.always,
    "faiss": faiss.unavailable,
}


# On the CPU faiss, where it is installed, overtakes the native kernel at large groups
# (benchmarks/test_shaping.py); the sizes are read inside the operator.
_BY_GROUP_SIZE = "native or faiss"
_FAISS_FROM = 1024


def _kernel(features: Tensor, group_ids: Tensor, backend: str) -> Tensor:
    if backend == _BY_GROUP_SIZE:
        distance = _native.nearest_neighbor_distance_up_to(
            features.contiguous(), group_ids.contiguous(), _FAISS_FROM - 1
        )
        if distance is not None:
            return distance
        backend = "faiss"
    run = kernels("nearest_neighbor", backend)
    return run.nearest_neighbor_distance(features, group_ids).to(_checks.compute_dtype(features))


def _fake(features: Tensor, group_ids: Tensor, backend: str) -> Tensor:
    return features.new_empty(features.shape[0], dtype=_checks.compute_dtype(features))


_distance = operator("nearest_neighbor_distance", _kernel, _fake)


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
    dtype = _checks.compute_dtype(features)
    chosen = _backends.select(
        "nearest_neighbor_distance", backend, features.device, dtype, BACKENDS
    )
    faiss_can_run = faiss.unavailable(features.device, dtype) is None
    if backend is None and chosen == "native" and faiss_can_run:
        chosen = _BY_GROUP_SIZE
    return _distance(features.detach(), group_ids, chosen)
