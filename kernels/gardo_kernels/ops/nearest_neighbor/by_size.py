"""The default on the CPU where faiss is installed: it overtakes the C++ kernel at large groups.

Where, ``benchmarks/test_shaping.py`` shows. The sizes are read inside the operator.
"""

from __future__ import annotations

from torch import Tensor

from gardo_kernels.ops.nearest_neighbor import faiss, native

_FAISS_FROM = 1024


def nearest_neighbor_distance(features: Tensor, group_ids: Tensor) -> Tensor:
    """As the two, in float32."""
    distance = native.distance_up_to(features, group_ids, _FAISS_FROM - 1)
    return faiss.nearest_neighbor_distance(features, group_ids) if distance is None else distance
