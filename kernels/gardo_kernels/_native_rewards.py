"""Tensor signatures of the C++ core: rewards and features of one epoch (see ``_native``)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gardo_kernels._native_core import (
    array,
    choice,
    cuda_unavailable_reason,
    float32,
    latents,
    require_core,
)

ADVANTAGE_NORMS = ("none", "group_std", "global_std")
_CPU = torch.device("cpu")
GATE_MODES = ("paper", "official", "all", "off")
SCOPES = ("batch", "group")


class NativeShapedRewards(NamedTuple):
    """What :func:`shape_rewards` returns, on the device of the rewards and in their dtype."""

    advantage: Tensor  # [N]
    uncertainty: Tensor  # [N]
    gate: Tensor  # [N] bool
    threshold: Tensor  # []
    mean_uncertainty: Tensor  # []


def shape_rewards(
    proxy: Tensor,
    aux: Tensor,
    group_ids: Tensor,
    distance: Tensor | None = None,
    fraction: float | Tensor = 0.1,
    advantage_norm: str = "none",
    gate: str = "paper",
    scope: str = "batch",
) -> NativeShapedRewards:
    """Advantages, win-rate uncertainties and gate of N samples, on the device of ``proxy``.

    ``proxy`` ``[N]``, ``aux`` ``[K, N]`` and ``distance`` ``[N]`` are float64, or on the CPU all
    float32 (computed in float64); ``group_ids`` is ``[N]`` int64. A sample with a value that is not
    finite takes no part: advantage 0, uncertainty 0, not gated, left out of every mean and ranking.
    The arguments mean what they mean to :func:`gardo_kernels.shape_rewards`.

    On a GPU (``RuntimeError`` where the core was built without CUDA) the work is enqueued on the
    current stream and can be captured in a CUDA graph: one kernel up to 4096 samples and 16
    auxiliaries, sorting above. There ``fraction`` may be a 0-d float64 tensor on the device.
    """
    core = require_core()
    device, dtype = proxy.device, torch.float64
    if device == _CPU and proxy.dtype == torch.float32:
        dtype = torch.float32
    if proxy.dim() != 1:
        raise ValueError(f"proxy: expected shape [N], got {list(proxy.shape)}")
    if aux.dim() != 2:
        raise ValueError(f"aux: expected shape [K, N], got {list(aux.shape)}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"proxy: expected a CPU or CUDA tensor, got device {device}")
    if isinstance(fraction, Tensor) and device.type == "cpu":
        fraction = float(fraction)
    if not isinstance(fraction, Tensor) and not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}")
    samples, num_aux = proxy.shape[0], aux.shape[0]
    result = NativeShapedRewards(
        torch.empty_like(proxy),
        torch.empty_like(proxy),
        torch.empty_like(group_ids, dtype=torch.bool),
        proxy.new_empty(()),
        proxy.new_empty(()),
    )
    arguments: dict[str, Any] = {
        "proxy": array("proxy", proxy, dtype, (samples,), device),
        "aux": array("aux", aux, dtype, (num_aux, samples), device),
        "group_ids": array("group_ids", group_ids, torch.int64, (samples,), device),
        "distance": array("distance", distance, dtype, (samples,), device),
        "num_samples": samples,
        "num_aux": num_aux,
        "fraction": 0.0 if isinstance(fraction, Tensor) else fraction,
        "advantage_norm": choice("advantage_norm", advantage_norm, ADVANTAGE_NORMS),
        "gate_mode": choice("gate", gate, GATE_MODES),
        "scope": choice("scope", scope, SCOPES),
        "num_threads": torch.get_num_threads(),
        **{name: value.data_ptr() for name, value in result._asdict().items()},
    }
    if dtype == torch.float32:
        core.shape_rewards_float32(**arguments)
    elif device == _CPU:
        core.shape_rewards(**arguments)
    else:
        _shape_rewards_cuda(core, arguments, fraction, device)
    return result


def _shape_rewards_cuda(
    core: ModuleType, arguments: dict[str, Any], fraction: float | Tensor, device: torch.device
) -> None:
    _require_cuda(device)
    held = fraction.reshape(()) if isinstance(fraction, Tensor) else None
    size = core.shape_rewards_cuda_workspace(arguments["num_samples"], arguments["num_aux"])
    share = array("fraction", held, torch.float64, (), device)
    _enqueue(core.shape_rewards_cuda, device, size, device_fraction=share, **arguments)


def win_rate(rewards: Tensor, group_ids: Tensor | None = None) -> Tensor:
    """Share of the others that each sample beats, a tie counting one half, ``[K, N]`` float64.

    ``rewards`` is ``[K, N]`` float64, ``group_ids`` ``[N]`` int64 (None: one group). NaN stays NaN
    and is no one's rival; a sample without others has 0.5. On a GPU as :func:`shape_rewards`.
    """
    core = require_core()
    device = rewards.device
    if rewards.dim() != 2:
        raise ValueError(f"rewards: expected shape [K, N], got {list(rewards.shape)}")
    num_rewards, samples = rewards.shape
    rate = torch.empty_like(rewards)
    arguments: dict[str, Any] = {
        "rewards": array("rewards", rewards, torch.float64, (num_rewards, samples), device),
        "group_ids": array("group_ids", group_ids, torch.int64, (samples,), device),
        "num_rewards": num_rewards,
        "num_samples": samples,
        "num_threads": torch.get_num_threads(),
        "rate": rate.data_ptr(),
    }
    if device.type == "cpu":
        core.win_rate(**arguments)
    else:
        _require_cuda(device)
        _enqueue(core.win_rate_cuda, device, core.win_rate_cuda_workspace(samples), **arguments)
    return rate


def _require_cuda(device: torch.device) -> None:
    reason = cuda_unavailable_reason() if device.type == "cuda" else "it knows CPU and CUDA"
    if reason is not None:
        raise RuntimeError(f"backend 'native' is not available on {device}: {reason}")


def _enqueue(
    function: Callable[..., None], device: torch.device, workspace_bytes: int, **arguments: Any
) -> None:
    """Call a CUDA function of the core on the current stream, with a workspace."""
    with torch.cuda.device(device):
        # Freed on return: PyTorch's allocator hands it out again in the order of the stream.
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
        function(
            **arguments,
            workspace=workspace.data_ptr(),
            workspace_size=workspace_bytes,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )


def nearest_neighbor_distance(features: Tensor, group_ids: Tensor) -> Tensor:
    """Cosine distance to the nearest other member of the group, ``[N]`` float32 in ``[0, 2]``.

    ``features`` ``[N, D]`` float32, float16 or bfloat16 of any length, ``group_ids`` ``[N]`` int64.
    0 for a sample without another usable member, NaN for a row that is not finite (it is no one's
    neighbour), distance 1 from and to a zero row, exactly 0 between identical rows.
    """
    distance, _ = _nearest_neighbor(features, group_ids, len(group_ids))
    return distance


def nearest_neighbor_distance_up_to(
    features: Tensor, group_ids: Tensor, max_group: int
) -> Tensor | None:
    """As above; None, with nothing computed, where a group has more than ``max_group`` members."""
    distance, computed = _nearest_neighbor(features, group_ids, max_group)
    return distance if computed else None


def _nearest_neighbor(features: Tensor, group_ids: Tensor, max_group: int) -> tuple[Tensor, bool]:
    core = require_core()
    if features.dim() != 2:
        raise ValueError(f"features: expected shape [N, D], got {list(features.shape)}")
    samples, dim = features.shape
    distance = float32(samples)
    computed = core.nearest_neighbor(
        features=latents("features", features, features),
        group_ids=array("group_ids", group_ids, torch.int64, (samples,)),
        num_samples=samples,
        dim=dim,
        max_group=max_group,
        num_threads=torch.get_num_threads(),
        distance=distance.data_ptr(),
    )
    return distance, computed
