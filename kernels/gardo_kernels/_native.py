"""The compiled C++ core with tensor signatures.

The core knows neither torch nor Python objects: it takes addresses and sizes. The ``_native_*``
modules are the only ones that pass them.

Tensors are on the CPU, but for ``shape_rewards``, which also takes CUDA tensors. Latents are
contiguous tensors ``[B, ...]`` of the same shape, each float32, float16 or bfloat16
on its own. Row scalars (``a``, ``b``, ...) are float32, 0-d or ``[B]``. Nothing here is
differentiable: the gradients are functions of their own. Every function raises ``TypeError`` for a
wrong dtype, ``ValueError`` for a wrong shape, device or layout, and ``RuntimeError`` without the
core. Results do not depend on the number of threads, nor on the other rows of the batch.
"""

from gardo_kernels._native_core import (
    LATENT_DTYPES,
    as_float32,
    cuda_unavailable_reason,
    has_cuda,
    has_openmp,
    is_available,
    unavailable_reason,
)
from gardo_kernels._native_latents import (
    NativeGRPOLoss,
    NativeNFTLoss,
    NativeStep,
    affine_backward,
    grpo_loss,
    nft_backward,
    nft_loss,
    sde_log_prob,
    sde_step,
)
from gardo_kernels._native_rewards import (
    NativeShapedRewards,
    nearest_neighbor_distance,
    nearest_neighbor_distance_up_to,
    shape_rewards,
    win_rate,
)

__all__ = [
    "LATENT_DTYPES",
    "NativeGRPOLoss",
    "NativeNFTLoss",
    "NativeShapedRewards",
    "NativeStep",
    "affine_backward",
    "as_float32",
    "cuda_unavailable_reason",
    "grpo_loss",
    "has_cuda",
    "has_openmp",
    "is_available",
    "nearest_neighbor_distance",
    "nearest_neighbor_distance_up_to",
    "nft_backward",
    "nft_loss",
    "sde_log_prob",
    "sde_step",
    "shape_rewards",
    "unavailable_reason",
    "win_rate",
]
