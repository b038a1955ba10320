"""The C++ and CUDA kernels of the win rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gardo_kernels import core
from gardo_kernels.backends import native_any_device as unavailable

__all__ = ["unavailable", "win_rate"]


def win_rate(rewards: Tensor, group_ids: Tensor | None) -> Tensor:
    """Share of the others that each sample beats, a tie counting one half, ``[K, N]`` float64.

    ``rewards`` is ``[K, N]`` float64, ``group_ids`` ``[N]`` int64 (None: one group). NaN stays NaN
    and is no one's rival; a sample without others has 0.5. On a GPU the work is enqueued on the
    current stream and can be captured in a CUDA graph.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards: expected shape [K, N], got {list(rewards.shape)}")
    native = core.require_core()
    device = core.require_device("rewards", rewards)
    rewards, group_ids = rewards.contiguous(), core.dense(group_ids)
    num_rewards, samples = rewards.shape
    rate = torch.empty_like(rewards)
    arguments: dict[str, Any] = {
        "rewards": core.array("rewards", rewards, torch.float64, (num_rewards, samples), device),
        "group_ids": core.array("group_ids", group_ids, torch.int64, (samples,), device),
        "num_rewards": num_rewards,
        "num_samples": samples,
        "num_threads": torch.get_num_threads(),
        "rate": rate.data_ptr(),
    }
    if device.type == "cpu":
        native.win_rate(**arguments)
    else:
        size = native.win_rate_cuda_workspace(samples)
        core.enqueue(native.win_rate_cuda, device, size, **arguments)
    return rate
