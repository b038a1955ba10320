"""The C++ and CUDA kernels of the gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gardo_kernels import core
from gardo_kernels.backends import native_any_device as unavailable

__all__ = ["SCOPES", "SHARES", "SIDES", "TIES", "gate_samples", "unavailable"]

#: In the order of the core's codes.
SIDES = ("over", "under")
TIES = ("half", "ordinal", "strict")
SHARES = ("all", "nonnegative")
SCOPES = ("batch", "group")


def gate_samples(
    proxy: Tensor,
    aux: Tensor,
    group_ids: Tensor,
    fraction: float,
    fraction_tensor: Tensor | None,
    side: str,
    ties: str,
    share_of: str,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``uncertainty, gate, threshold, mean_uncertainty`` of N samples.

    ``proxy`` ``[N]`` and ``aux`` ``[K, N]`` are float64, ``group_ids`` is int64 ``[N]``;
    ``fraction_tensor``, 0-d, replaces ``fraction``. On a GPU the work is enqueued on the current
    stream and can be captured in a CUDA graph: one kernel up to 4096 samples and 16 auxiliaries,
    sorting above.
    """
    native = core.require_core()
    device = core.require_device("proxy", proxy)
    proxy, aux, group_ids = proxy.contiguous(), aux.contiguous(), group_ids.contiguous()
    if device.type == "cpu" and fraction_tensor is not None:
        fraction, fraction_tensor = float(fraction_tensor), None
    samples, num_aux = proxy.shape[0], aux.shape[0]
    uncertainty, mean_uncertainty = torch.empty_like(proxy), proxy.new_empty(())
    gate = torch.empty_like(proxy, dtype=torch.bool)
    threshold = proxy.new_empty(threshold_shape(samples, share_of, scope))
    arguments: dict[str, Any] = {
        "proxy": core.array("proxy", proxy, torch.float64, (samples,), device),
        "aux": core.array("aux", aux, torch.float64, (num_aux, samples), device),
        "group_ids": core.array("group_ids", group_ids, torch.int64, (samples,), device),
        "num_samples": samples,
        "num_aux": num_aux,
        "fraction": fraction,
        "side": core.choice("side", side, SIDES),
        "ties": core.choice("ties", ties, TIES),
        "share_of": core.choice("share_of", share_of, SHARES),
        "scope": core.choice("scope", scope, SCOPES),
        "num_threads": torch.get_num_threads(),
        "uncertainty": uncertainty.data_ptr(),
        "gate": gate.data_ptr(),
        "threshold": threshold.data_ptr(),
        "mean_uncertainty": mean_uncertainty.data_ptr(),
    }
    if device.type == "cpu":
        native.gate_samples(**arguments)
    else:
        size = native.gate_samples_cuda_workspace(samples, num_aux)
        share = None if fraction_tensor is None else fraction_tensor.to(torch.float64)
        at = core.array("fraction", share, torch.float64, (), device)
        core.enqueue(native.gate_samples_cuda, device, size, device_fraction=at, **arguments)
    return uncertainty, gate, threshold, mean_uncertainty


def threshold_shape(samples: int, share_of: str, scope: str) -> tuple[int, ...]:
    """One threshold, or one for each group, given for each sample."""
    return (samples,) if (share_of, scope) == ("all", "group") else ()
