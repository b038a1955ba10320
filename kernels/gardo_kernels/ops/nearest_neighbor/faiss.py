"""Nearest neighbours by faiss, for groups too large for the fused kernels."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from gardo_kernels.checks import compute_dtype
from gardo_kernels.ops.nearest_neighbor.reference import normalized

# Looked up once: a search of the import path takes as long as the distances of a small group.
_HAS_FAISS = importlib.util.find_spec("faiss") is not None


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Availability of faiss; it takes tensors of any device through host memory."""
    if not _HAS_FAISS:
        return "faiss is not installed (pip install faiss-cpu, or faiss-gpu on a CUDA machine)"
    return None


def nearest_neighbor_distance(features: Tensor, group_ids: Tensor) -> Tensor:
    """As the reference, by an exact inner-product index per group; float32 accuracy."""
    import faiss

    unit = normalized(features.to(torch.float32)).cpu().contiguous()
    ids = group_ids.cpu()
    distance = torch.zeros(features.shape[0], dtype=torch.float64)
    order = torch.argsort(ids, stable=True)
    _, sizes = torch.unique_consecutive(ids[order], return_counts=True)
    for members in order.split(sizes.tolist()):
        usable = members[unit[members].isfinite().all(-1)]
        if len(usable) > 1:
            distance[usable] = _within(faiss, unit[usable])
    distance[unit.isnan().any(-1)] = torch.nan
    return distance.to(features.device, compute_dtype(features))


def _within(faiss: Any, unit: Tensor) -> Tensor:
    index = faiss.IndexFlatIP(unit.shape[1])
    if hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(unit.numpy())
    similarity, neighbour = index.search(unit.numpy(), 2)
    similarity, neighbour = torch.from_numpy(similarity), torch.from_numpy(neighbour)
    # Among duplicates the first hit need not be the sample itself.
    own = neighbour[:, 0] == torch.arange(len(unit))
    nearest = torch.where(own, similarity[:, 1], similarity[:, 0]).to(torch.float64)
    return (1 - nearest).clamp(0, 2)
