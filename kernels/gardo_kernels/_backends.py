"""Choice of the backend that runs an op.

Every op has a ``reference`` backend (plain PyTorch). ``native`` (C++, CPU tensors) and ``triton``
(CUDA tensors) are the fast ones; they compute in float32, so float64 inputs, which serve oracle
runs, have the reference alone. ``backend=None`` takes the best one that can run; a backend asked
for by name is used or refused with the reason, never replaced in silence.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping

import torch

from gardo_kernels import _checks, _native

#: For a device and a compute dtype: None if the backend can run there, else why it cannot.
Availability = Callable[[torch.device, torch.dtype], "str | None"]

# Looked up once, so that torch.compile can trace the choice.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run here; the message says why."""


def always(device: torch.device, dtype: torch.dtype) -> str | None:
    """Availability of a backend that runs on every device."""
    return None


def native_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Availability of the compiled C++ core, which works on float32 CPU tensors."""
    if device.type != "cpu":
        return f"it runs on the CPU, got device {device}"
    if dtype == torch.float64:
        return "it computes in float32, got float64 inputs"
    return _native.unavailable_reason()


def native_cpu_any_dtype(device: torch.device, dtype: torch.dtype) -> str | None:
    """As :func:`native_cpu`, for the ops that the core computes in float64."""
    return native_cpu(device, torch.float32)


def native_any_device(device: torch.device, dtype: torch.dtype) -> str | None:
    """As :func:`native_cpu_any_dtype`, for the ops with a CUDA form in the core."""
    if device.type == "cuda":
        return _native.cuda_unavailable_reason()
    return native_cpu_any_dtype(device, dtype)


def triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Availability of Triton: on CUDA, or on the CPU under its interpreter (for tests)."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if dtype == torch.float64:
        return "it computes in float32, got float64 inputs"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it runs on CUDA (or on the CPU with TRITON_INTERPRET=1), got device {device}"


def select(
    op: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    candidates: Mapping[str, Availability],
) -> str:
    """Return the name of the backend to run.

    ``candidates`` maps names to availability, best first. Raises ``ValueError`` for a name that
    the op does not know and :class:`BackendUnavailable` for one that cannot run on ``device``.
    """
    if backend is None:
        for name, unavailable in candidates.items():
            interpreted = name == "triton" and device.type == "cpu"
            if not interpreted and unavailable(device, dtype) is None:
                return name
        raise BackendUnavailable(f"{op}: no backend can run on {device}")
    _checks.choice("backend", backend, tuple(candidates))
    reason = candidates[backend](device, dtype)
    if reason is not None:
        raise BackendUnavailable(f"{op}: backend {backend!r} is not available: {reason}")
    return backend
