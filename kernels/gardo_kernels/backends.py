"""Choice of the backend that runs an op: one file of its folder each.

Every op has a ``reference`` backend (plain PyTorch). ``native`` (C++, CPU tensors) and ``triton``
(CUDA tensors) are the fast ones; they compute in float32, so float64 inputs, which serve oracle
runs, have the reference alone. ``backend=None`` takes the best one that can run; a backend asked
for by name is used or refused with the reason, never replaced in silence.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Iterable, Mapping

import torch

from gardo_kernels import checks, core

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
    return core.unavailable_reason()


def native_any_device(device: torch.device, dtype: torch.dtype) -> str | None:
    """As :func:`native_cpu`, for the ops that have a CUDA form and are computed in float64."""
    if device.type == "cuda":
        return core.cuda_unavailable_reason()
    return native_cpu(device, torch.float32)


def triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Availability of Triton: on CUDA, or on the CPU under its interpreter (for tests)."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if dtype == torch.float64:
        return "it computes in float32, got float64 inputs"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it runs on CUDA (or on the CPU with TRITON_INTERPRET=1), got device {device}"


_KINDS: dict[str, Availability] = {
    "native": native_cpu,
    "triton": triton,
    "reference": always,
}


def discover(package: str, path: Iterable[str]) -> dict[str, Availability]:
    """The backends that have a file in the folder of an op, best first.

    A file called ``native``, ``triton`` or ``reference`` is one, and so is any other that says with
    a function ``unavailable`` where it cannot run; ``native`` may say so too, where it can do more
    than :func:`native_cpu`. ``triton`` is not imported before it is used.
    """
    files = {module.name for module in pkgutil.iter_modules(path)}
    found = {name: kind for name, kind in _KINDS.items() if name in files}
    for name in sorted(files - {"triton", "reference"}):
        module = importlib.import_module(f"{package}.{name}")
        if hasattr(module, "unavailable"):
            found[name] = module.unavailable
    return found


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
    checks.choice("backend", backend, tuple(candidates))
    reason = candidates[backend](device, dtype)
    if reason is not None:
        raise BackendUnavailable(f"{op}: backend {backend!r} is not available: {reason}")
    return backend
