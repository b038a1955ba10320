"""Loads the compiled C++ core and gives its functions tensor signatures.

The core knows neither torch nor Python objects: it takes addresses and sizes. This module is the
only one that passes them; it checks what memory safety needs (dtype, shape, device, contiguity) and
leaves the meaning of values to the ops that call it.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch  # first: the core then shares torch's OpenMP runtime instead of loading its own
from torch import Tensor

_MODULE = "gardo_kernels._C"
ADVANTAGE_NORMS = ("none", "group_std", "global_std")
GATE_MODES = ("paper", "official", "all", "off")
SCOPES = ("batch", "group")


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(_MODULE), None
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise
        return None, (
            "the C++ core is not built (installed with GARDO_NO_NATIVE=1, or from a source tree "
            "without `pip install -e .`)"
        )
    except ImportError as error:  # built, but it does not load here, e.g. for an older libstdc++
        return None, f"the C++ core does not load: {error}"


_core, _reason = _load()


def is_available() -> bool:
    """Whether the compiled core is loaded."""
    return _core is not None


def unavailable_reason() -> str | None:
    """Why the compiled core is not loaded; None when it is."""
    return _reason


def has_openmp() -> bool:
    """Whether the core is loaded and was built with OpenMP."""
    return _core is not None and bool(_core.has_openmp)


def _require_core() -> ModuleType:
    if _core is None:
        raise RuntimeError(f"backend 'native' is not available: {_reason}")
    return _core


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Returns `tensor` if the core may read it as a contiguous CPU array of `dtype` and `shape`."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected a CPU tensor, got device {tensor.device}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor


def _choice(name: str, value: str, choices: tuple[str, ...]) -> int:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return choices.index(value)


class NativeShapedRewards(NamedTuple):
    """What `shape_rewards` returns; all on the CPU."""

    advantage: Tensor  # [N] float64
    uncertainty: Tensor  # [N] float64
    gate: Tensor  # [N] bool
    threshold: Tensor  # [] float64
    mean_uncertainty: Tensor  # [] float64


def shape_rewards(
    proxy: Tensor,
    aux: Tensor,
    group_ids: Tensor,
    distance: Tensor | None = None,
    fraction: float = 0.1,
    advantage_norm: str = "none",
    gate: str = "paper",
    scope: str = "batch",
) -> NativeShapedRewards:
    """Advantages, win-rate uncertainties and gate of N samples, in O(K N log N).

    Args:
        proxy: [N] float64, contiguous, CPU; NaN marks a missing reward.
        aux: [K, N] float64, contiguous, CPU.
        group_ids: [N] int64, any values in any order.
        distance: [N] float64 or None (no diversity factor).
        fraction: share of the samples with non-negative uncertainty to gate, in [0, 1].
        advantage_norm: `none`, `group_std` or `global_std`.
        gate: `paper`, `official` (descending ordinal ranks), `all` or `off`.
        scope: `batch` or `group`: whom a sample's rewards are ranked against.

    Raises:
        TypeError: a dtype is not the one listed.
        ValueError: a shape, device, layout or value is not one of those listed.
        RuntimeError: the compiled core is not available.
    """
    core = _require_core()
    if proxy.dim() != 1:
        raise ValueError(f"proxy: expected shape [N], got {list(proxy.shape)}")
    if aux.dim() != 2:
        raise ValueError(f"aux: expected shape [K, N], got {list(aux.shape)}")
    samples, num_aux = proxy.shape[0], aux.shape[0]
    _check("proxy", proxy, torch.float64, (samples,))
    _check("aux", aux, torch.float64, (num_aux, samples))
    _check("group_ids", group_ids, torch.int64, (samples,))
    if distance is not None:
        _check("distance", distance, torch.float64, (samples,))
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}")
    advantage = torch.empty(samples, dtype=torch.float64)
    uncertainty = torch.empty(samples, dtype=torch.float64)
    mask = torch.empty(samples, dtype=torch.bool)
    threshold = torch.empty((), dtype=torch.float64)
    mean_uncertainty = torch.empty((), dtype=torch.float64)
    core.shape_rewards(
        proxy=proxy.data_ptr(),
        aux=aux.data_ptr(),
        group_ids=group_ids.data_ptr(),
        distance=0 if distance is None else distance.data_ptr(),
        num_samples=samples,
        num_aux=num_aux,
        fraction=fraction,
        advantage_norm=_choice("advantage_norm", advantage_norm, ADVANTAGE_NORMS),
        gate_mode=_choice("gate", gate, GATE_MODES),
        scope=_choice("scope", scope, SCOPES),
        num_threads=torch.get_num_threads(),
        advantage=advantage.data_ptr(),
        uncertainty=uncertainty.data_ptr(),
        gate=mask.data_ptr(),
        threshold=threshold.data_ptr(),
        mean_uncertainty=mean_uncertainty.data_ptr(),
    )
    return NativeShapedRewards(advantage, uncertainty, mask, threshold, mean_uncertainty)
