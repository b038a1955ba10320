"""Coefficient tables: every SDE step of a flow model is affine in the sample and the velocity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gardo_kernels import checks

KINDS = ("flow", "cps", "dance", "ode")
#: The fields that kernels read, in the order in which they are handed over.
OPERANDS = ("a", "b", "c", "scale", "offset", "kl")
KL_SCALES = ("exact", "official")


@dataclass(frozen=True)
class SDECoefficients:
    """Coefficients of one affine step (0-d fields) or of one step per row (``[B]`` fields)::

        mean     = a*x + b*v
        prev     = mean + c*z                                  z standard normal
        log_prob = offset - scale * mean_over_latent((prev - mean)^2)
        KL       = kl * mean_over_latent((v - v_ref)^2)

    ``std`` is the variant's own ``std_dev_t``, which published code logs and returns. A table for a
    whole schedule has ``[T]`` fields; ``table[i]`` is its step ``i`` and ``table[indices]`` gives
    one step per sample.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    scale: Tensor
    offset: Tensor
    kl: Tensor
    std: Tensor
    kind: str

    @property
    def shape(self) -> torch.Size:
        """Shape shared by all fields: ``[]`` or ``[B]``."""
        return self.a.shape

    @property
    def device(self) -> torch.device:
        """Device shared by all fields."""
        return self.a.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype shared by all fields: float32 unless asked otherwise."""
        return self.a.dtype

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name, without ``kind``."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kind"}

    def operands(self) -> list[Tensor]:
        """The fields that kernels read, as the one tensor list that they take (`OPERANDS`)."""
        return [self.a, self.b, self.c, self.scale, self.offset, self.kl]

    def to(self, device: torch.device | str) -> SDECoefficients:
        """The same coefficients on ``device``."""
        return self.map(lambda value: value.to(device))

    def expand(self, batch: int) -> SDECoefficients:
        """Fields of shape ``[batch]``; 0-d fields are repeated (as views)."""
        return self.map(lambda value: value.expand(batch))

    def __getitem__(self, index: Any) -> SDECoefficients:
        """Index every field: an int gives one step, an int64 tensor one step per row."""
        if self.a.dim() == 0:
            raise IndexError("SDECoefficients of a single step (0-d fields) cannot be indexed")
        return self.map(lambda value: value[index])

    def __len__(self) -> int:
        if self.a.dim() == 0:
            raise TypeError("SDECoefficients of a single step (0-d fields) have no length")
        return self.a.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> SDECoefficients:
        """Coefficients with ``change`` applied to each tensor field."""
        changed = {name: change(value) for name, value in self.tensors().items()}
        return SDECoefficients(**changed, kind=self.kind)


def sde_coefficients(
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    noise_level: float = 0.7,
    kind: str = "flow",
    sigma_max: Tensor | float | None = None,
    kl_scale: str = "exact",
    *,
    dtype: torch.dtype = torch.float32,
) -> SDECoefficients:
    """Coefficients of the step from noise level ``sigma`` to ``sigma_next``.

    Args:
        sigma, sigma_next: numbers or floating tensors, 0-d or ``[B]``, with
            ``0 <= sigma_next < sigma <= 1``. A whole schedule is ``sigmas[:-1], sigmas[1:]``.
        noise_level: eta, the amount of noise; 0 leaves no noise (and no log_prob).
        kind: ``flow`` (Flow-GRPO), ``cps`` (Flow-CPS), ``dance`` (DanceGRPO) or ``ode``.
        sigma_max: the second sigma of the schedule, which replaces ``sigma == 1`` in the standard
            deviation of ``flow``, where it would be infinite. Needed only there.
        kl_scale: ``exact`` is the KL of the true transition, b^2/(2 c^2); ``official`` divides by
            ``std`` in place of ``c`` as the published code does.
        dtype: of the fields; float64 serves tests against an oracle.

    Computed in float64 and then rounded to ``dtype``. ``ode`` has no density: its ``scale``,
    ``offset`` and ``kl`` are NaN. Where ``c`` is 0 (the last step of ``cps``) ``kl`` is infinite;
    such a step is not meant to be trained.

    Values of tensors on an accelerator are not checked, except that ``flow`` without ``sigma_max``
    must look for ``sigma == 1``: build the table on the CPU once and move it with ``.to(device)``.

    Raises ``TypeError``/``ValueError`` for wrong types, shapes or values.
    """
    checks.choice("kind", kind, KINDS)
    checks.choice("kl_scale", kl_scale, KL_SCALES)
    eta = checks.number("noise_level", noise_level, low=0.0)
    if kind == "cps" and eta > 1:
        raise ValueError(f"noise_level: expected a number in [0, 1] for kind 'cps', got {eta}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
    s = _sigma("sigma", sigma, None)
    s_next = _sigma("sigma_next", sigma_next, s.device if isinstance(sigma, Tensor) else None)
    s = s.to(s_next.device)
    if s.dim() == 1 and s_next.dim() == 1 and s.shape != s_next.shape:
        raise ValueError(f"sigma_next: expected shape {list(s.shape)}, got {list(s_next.shape)}")
    s, s_next = torch.broadcast_tensors(s, s_next)
    _check_range(s, s_next)
    if kind == "flow":
        s_std = _finite_sigma(s, sigma_max)
    else:
        s_std = s
    table = _float64_table(kind, s, s_next, s_std, eta, kl_scale)
    return table.map(lambda value: value.to(dtype).contiguous())


def _float64_table(
    kind: str, s: Tensor, s_next: Tensor, s_std: Tensor, eta: float, kl_scale: str
) -> SDECoefficients:
    dt = s_next - s
    if kind == "flow":
        std = eta * torch.sqrt(s / (1 - s_std))
        a = 1 + std**2 * dt / (2 * s)
        b = (1 + std**2 * (1 - s) / (2 * s)) * dt
        c = std * torch.sqrt(-dt)
    elif kind == "cps":
        std = s_next * math.sin(eta * math.pi / 2)
        kept = torch.sqrt(s_next**2 - std**2)  # share of the predicted noise that is kept
        a = (1 - s_next) + kept
        b = -s * (1 - s_next) + (1 - s) * kept
        c = std
    elif kind == "dance":
        # Its score term -(x - (1-s)(x - s v))/s^2 simplifies to -(x + (1-s) v)/s.
        std = eta * torch.sqrt(-dt)
        a = 1 + eta**2 * dt / (2 * s)
        b = (1 + eta**2 * (1 - s) / (2 * s)) * dt
        c = std
    else:
        std = torch.zeros_like(s)
        a, b, c = torch.ones_like(s), dt, std
    if kind == "ode":
        undefined = torch.full_like(s, math.nan)
        return SDECoefficients(a, b, c, undefined, undefined, undefined, std, kind)
    if kind == "cps":  # its log_prob leaves out every constant
        scale, offset = torch.ones_like(s), torch.zeros_like(s)
    else:
        scale, offset = _gaussian_terms(c)
    spread = c if kl_scale == "exact" else std
    return SDECoefficients(a, b, c, scale, offset, b**2 / (2 * spread**2), std, kind)


def gaussian_coefficients(a: Tensor, b: Tensor, c: Tensor) -> SDECoefficients:
    """Coefficients of kind ``affine``: any Gaussian step ``prev = a*x + b*v + c*z``.

    ``a``, ``b`` and ``c`` share shape ``[]`` or ``[B]``, device and dtype. Lets other samplers use
    the same kernels.
    """
    wide_b, wide_c = b.to(torch.float64), c.to(torch.float64)
    scale, offset = _gaussian_terms(wide_c)
    kl = wide_b**2 / (2 * wide_c**2)
    return SDECoefficients(
        a, b, c, scale.to(a.dtype), offset.to(a.dtype), kl.to(a.dtype), std=c, kind="affine"
    )


def _gaussian_terms(c: Tensor) -> tuple[Tensor, Tensor]:
    """``scale`` and ``offset`` of a normal density with standard deviation ``c``."""
    return 1 / (2 * c**2), -torch.log(c) - 0.5 * math.log(2 * math.pi)


def _sigma(name: str, value: Any, device: torch.device | None) -> Tensor:
    if isinstance(value, Tensor):
        checks.floating(name, value)
        if device is not None:
            checks.same_device(name, value, device)
        if value.dim() > 1:
            raise ValueError(f"{name}: expected shape [] or [B], got {list(value.shape)}")
        return value.detach().to(torch.float64)
    return torch.tensor(checks.number(name, value), dtype=torch.float64, device=device)


def _check_range(s: Tensor, s_next: Tensor) -> None:
    if s.device.type != "cpu":
        return
    if not bool(((s > 0) & (s <= 1)).all()):
        raise ValueError(f"sigma: expected values in (0, 1], got {s.tolist()}")
    if not bool(((s_next >= 0) & (s_next < s)).all()):
        raise ValueError(
            f"sigma_next: expected values in [0, sigma), got {s_next.tolist()} "
            f"for sigma {s.tolist()}"
        )


def _finite_sigma(s: Tensor, sigma_max: Tensor | float | None) -> Tensor:
    """``s`` with ``s == 1`` replaced by ``sigma_max``."""
    if sigma_max is None:
        if bool((s == 1).any()):
            raise ValueError(
                "sigma_max: expected the second sigma of the schedule, because sigma contains 1 "
                "where kind 'flow' has no finite standard deviation, got None"
            )
        return s
    if isinstance(sigma_max, Tensor):
        checks.floating("sigma_max", sigma_max)
        if sigma_max.numel() != 1:
            raise ValueError(f"sigma_max: expected one value, got shape {list(sigma_max.shape)}")
        limit = sigma_max.detach().reshape(()).to(device=s.device, dtype=torch.float64)
    else:
        limit = torch.tensor(
            checks.number("sigma_max", sigma_max), dtype=torch.float64, device=s.device
        )
    if limit.device.type == "cpu" and not 0 < float(limit) < 1 and bool((s == 1).any()):
        raise ValueError(f"sigma_max: expected a value in (0, 1), got {float(limit)}")
    return torch.where(s == 1, limit, s)
