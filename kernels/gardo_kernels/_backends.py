"""Choice of the backend that runs an op.

Every op has a ``reference`` backend (plain PyTorch); ``native`` (C++, CPU) and ``triton`` (CUDA)
are added per op. ``backend=None`` takes the best one that is available for the device; a backend
asked for by name is used or refused with the reason, never replaced in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from gardo_kernels import _checks, _native

#: For a device: None if the backend can run there, else why it cannot.
Availability = Callable[[torch.device], "str | None"]


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run here; the message says why."""


def always(device: torch.device) -> str | None:
    """Availability of a backend that runs on every device."""
    return None


def select(
    op: str, backend: str | None, device: torch.device, candidates: Mapping[str, Availability]
) -> str:
    """Return the name of the backend to run.

    ``candidates`` maps names to availability, best first. Raises ``ValueError`` for a name that
    the op does not know and :class:`BackendUnavailable` for one that cannot run on ``device``.
    """
    if backend is None:
        for name, unavailable in candidates.items():
            if unavailable(device) is None:
                return name
        raise BackendUnavailable(f"{op}: no backend can run on {device}")
    _checks.choice("backend", backend, tuple(candidates))
    reason = candidates[backend](device)
    if reason is not None:
        raise BackendUnavailable(f"{op}: backend {backend!r} is not available: {reason}")
    return backend


def native_cpu(device: torch.device) -> str | None:
    """Availability of the compiled C++ core, which works on CPU tensors."""
    if device.type != "cpu":
        return f"it runs on the CPU, got device {device}"
    return _native.unavailable_reason()
