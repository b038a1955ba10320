"""The C++ and CUDA kernels of the reward shaping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gardo_kernels import core
from gardo_kernels.backends import native_any_device as unavailable

__all__ = ["shape_rewards", "unavailable"]

ADVANTAGE_NORMS = ("none", "group_std", "global_std")
GATES = ("paper", "official", "all", "off")
SCOPES = ("batch", "group")


def shape_rewards(
    proxy: Tensor,
    aux: Tensor,
    group_ids: Tensor,
    distance: Tensor | None,
    fraction: float,
    fraction_tensor: Tensor | None,
    advantage_norm: str,
    gate: str,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``advantage, uncertainty, gate, threshold, mean_uncertainty`` of N samples.

    ``proxy`` ``[N]``, ``aux`` ``[K, N]`` and ``distance`` ``[N]`` are float64, or on the CPU all
    float32 (computed in float64); ``group_ids`` is ``[N]`` int64. A sample with a value that is not
    finite takes no part: advantage 0, uncertainty 0, not gated, left out of every mean and ranking.

    On a GPU the work is enqueued on the current stream and can be captured in a CUDA graph: one
    kernel up to 4096 samples and 16 auxiliaries, sorting above. ``fraction_tensor``, 0-d, replaces
    ``fraction``.
    """
    native = core.require_core()
    device = core.require_device("proxy", proxy)
    proxy, aux, group_ids = proxy.contiguous(), aux.contiguous(), group_ids.contiguous()
    distance = core.dense(distance)
    dtype = torch.float64
    if device.type == "cpu" and proxy.dtype == torch.float32:
        dtype = torch.float32
    if device.type == "cpu" and fraction_tensor is not None:
        fraction, fraction_tensor = float(fraction_tensor), None
    samples, num_aux = proxy.shape[0], aux.shape[0]
    outputs = {
        "advantage": torch.empty_like(proxy),
        "uncertainty": torch.empty_like(proxy),
        "gate": torch.empty_like(group_ids, dtype=torch.bool),
        "threshold": proxy.new_empty(()),
        "mean_uncertainty": proxy.new_empty(()),
    }
    arguments: dict[str, Any] = {
        "proxy": core.array("proxy", proxy, dtype, (samples,), device),
        "aux": core.array("aux", aux, dtype, (num_aux, samples), device),
        "group_ids": core.array("group_ids", group_ids, torch.int64, (samples,), device),
        "distance": core.array("distance", distance, dtype, (samples,), device),
        "num_samples": samples,
        "num_aux": num_aux,
        "fraction": fraction,
        "advantage_norm": core.choice("advantage_norm", advantage_norm, ADVANTAGE_NORMS),
        "gate_mode": core.choice("gate", gate, GATES),
        "scope": core.choice("scope", scope, SCOPES),
        "num_threads": torch.get_num_threads(),
        **{name: value.data_ptr() for name, value in outputs.items()},
    }
    if dtype == torch.float32:
        native.shape_rewards_float32(**arguments)
    elif device.type == "cpu":
        native.shape_rewards(**arguments)
    else:
        size = native.shape_rewards_cuda_workspace(samples, num_aux)
        share = None if fraction_tensor is None else fraction_tensor.to(torch.float64)
        at = core.array("fraction", share, torch.float64, (), device)
        core.enqueue(native.shape_rewards_cuda, device, size, device_fraction=at, **arguments)
    return tuple(outputs.values())  # type: ignore[return-value]
