"""The C++ and CUDA kernels of the cap on the proxy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gardo_kernels import core
from gardo_kernels.backends import native_any_device as unavailable

__all__ = ["cap_rewards", "unavailable"]


def cap_rewards(
    proxy: Tensor, aux: Tensor, pool: Tensor, tau: float, tau_tensor: Tensor | None
) -> Tensor:
    """``[N]`` from ``proxy`` ``[N]``, ``aux`` ``[K, N]`` and ``pool`` ``[1 + K, M]``, all float64.

    The rows of ``pool`` ascend, and what is infinite in them is left out; ``tau_tensor``, 0-d,
    replaces ``tau``. On a GPU the work is enqueued on the current stream, as one kernel, and can be
    captured in a CUDA graph.
    """
    native = core.require_core()
    device = core.require_device("proxy", proxy)
    proxy, aux, pool = proxy.contiguous(), aux.contiguous(), pool.contiguous()
    if device.type == "cpu" and tau_tensor is not None:
        tau, tau_tensor = float(tau_tensor), None
    samples, num_aux, size = proxy.shape[0], aux.shape[0], pool.shape[1]
    capped = torch.empty_like(proxy)
    arguments: dict[str, Any] = {
        "proxy": core.array("proxy", proxy, torch.float64, (samples,), device),
        "aux": core.array("aux", aux, torch.float64, (num_aux, samples), device),
        "pool": core.array("pool", pool, torch.float64, (1 + num_aux, size), device),
        "num_samples": samples,
        "num_aux": num_aux,
        "pool_size": size,
        "tau": tau,
        "num_threads": torch.get_num_threads(),
        "capped": capped.data_ptr(),
    }
    if device.type == "cpu":
        native.cap_rewards(**arguments)
    else:
        at = core.array("tau", tau_tensor, torch.float64, (), device)
        core.enqueue(native.cap_rewards_cuda, device, 0, device_tau=at, **arguments)
    return capped
