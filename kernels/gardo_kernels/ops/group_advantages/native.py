"""The C++ and CUDA kernels of the group advantages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gardo_kernels import core
from gardo_kernels.backends import native_any_device as unavailable

__all__ = ["DIVERSITY_SCALES", "NORMS", "group_advantages", "unavailable"]

#: In the order of the core's codes.
NORMS = ("none", "group_std", "global_std")
DIVERSITY_SCALES = ("group_mean", "raw")


def group_advantages(
    proxy: Tensor, group_ids: Tensor, distance: Tensor | None, norm: str, diversity_scale: str
) -> Tensor:
    """``[N]`` float64 from float64 ``proxy`` and ``distance`` and int64 ``group_ids``.

    On a GPU the work is enqueued on the current stream and can be captured in a CUDA graph: one
    kernel up to 4096 samples, sorting above.
    """
    native = core.require_core()
    device, samples = core.require_device("proxy", proxy), proxy.shape[0]
    proxy, group_ids, distance = proxy.contiguous(), group_ids.contiguous(), core.dense(distance)
    advantage = torch.empty_like(proxy)
    arguments: dict[str, Any] = {
        "proxy": core.array("proxy", proxy, torch.float64, (samples,), device),
        "group_ids": core.array("group_ids", group_ids, torch.int64, (samples,), device),
        "distance": core.array("distance", distance, torch.float64, (samples,), device),
        "num_samples": samples,
        "norm": core.choice("norm", norm, NORMS),
        "diversity_scale": core.choice("diversity_scale", diversity_scale, DIVERSITY_SCALES),
        "num_threads": torch.get_num_threads(),
        "advantage": advantage.data_ptr(),
    }
    if device.type == "cpu":
        native.group_advantages(**arguments)
    else:
        size = native.group_advantages_cuda_workspace(samples)
        core.enqueue(native.group_advantages_cuda, device, size, **arguments)
    return advantage
