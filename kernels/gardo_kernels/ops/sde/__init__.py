"""SDE steps of flow models: coefficients, the step itself and its log-probability."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gardo_kernels import backends, checks
from gardo_kernels.inference import ordinary
from gardo_kernels.ops.sde import fused, reference
from gardo_kernels.ops.sde.coefficients import SDECoefficients, sde_coefficients
from gardo_kernels.ops.sde.philox import philox_normal

__all__ = ["SDECoefficients", "SDEStep", "sde_coefficients", "sde_log_prob", "sde_step"]

#: Backends by name, best first: the files of this folder.
BACKENDS = backends.discover(__name__, __path__)


class SDEStep(NamedTuple):
    """Result of :func:`sde_step`."""

    prev_sample: Tensor
    log_prob: Tensor
    mean: Tensor


def sde_step(
    velocity: Tensor,
    sample: Tensor,
    coef: SDECoefficients,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    backend: str | None = None,
) -> SDEStep:
    """One sampling step: ``prev = a*x + b*v + c*z`` and its log-probability.

    Args:
        velocity: ``[B, ...]`` model output, float32, float16 or bfloat16; contiguous or not.
        sample: ``[B, ...]`` current latents.
        coef: coefficients with 0-d or ``[B]`` fields, on the device of ``velocity``.
        noise: ``[B, ...]`` standard normal ``z``. Not together with ``seed``.
        seed: int, or one-element int64 tensor on the device of ``velocity`` (then the host never
            reads it and a CUDA graph can change it between replays). The noise is a function of
            the seed, the row's index and the element's index, the same on every backend.
        velocity_uncond: unconditional velocity for classifier-free guidance,
            ``v = v_u + guidance_scale*(v - v_u)``.
        guidance_scale: used with ``velocity_uncond`` only.
        backend: None for the best available, or a name.

    Without ``noise`` and ``seed`` the noise comes from PyTorch's default generator. ``ode`` takes
    no noise.

    Returns:
        ``prev_sample`` and ``mean`` ``[B, ...]``, ``log_prob`` ``[B]``: float32, or float64 if an
        input is float64. No gradient flows: train with :func:`sde_log_prob` or ``grpo_loss``, which
        give the same bits for the stored ``prev_sample``. ``log_prob`` is NaN for ``ode``.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or device, named in the message.
        BackendUnavailable: the backend asked for cannot run here.
    """
    check_velocities(velocity, sample, coef, velocity_uncond, guidance_scale)
    if noise is not None and seed is not None:
        raise ValueError("seed: expected None when noise is given, got both")
    if noise is not None:
        checks.latents("noise", noise, like=velocity)
    if seed is not None:
        seed = _seed_tensor(seed, velocity.device)
    dtype = checks.compute_dtype(velocity, sample, noise, velocity_uncond, coef.a)
    chosen = backends.select("sde_step", backend, velocity.device, dtype, BACKENDS)
    guidance = float(guidance_scale)
    if coef.kind == "ode":
        noise = seed = None
    elif noise is None and seed is None:
        seed = torch.randint(2**62, (1,), device=velocity.device)
    with torch.no_grad():
        if chosen != "reference":
            table = coef.operands()
            return SDEStep(
                *fused.sde_step(
                    chosen, velocity, sample, table, noise, seed, velocity_uncond, guidance
                )
            )
        if seed is not None:
            noise = philox_normal(seed, velocity.shape)
        return SDEStep(
            *reference.sde_step(velocity, sample, coef, noise, velocity_uncond, guidance, dtype)
        )


def sde_log_prob(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    coef: SDECoefficients,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Log-probability ``[B]`` of a stored ``prev_sample``, mean over the latent dimensions.

    Arguments as in :func:`sde_step`. float32 (float64 if an input is float64); differentiable in
    ``velocity`` and ``velocity_uncond``. Equal velocities give the bits that :func:`sde_step`
    gave. Raises ``ValueError`` for coefficients of kind ``ode``, which have no density, and as
    :func:`sde_step` otherwise.
    """
    check_velocities(velocity, sample, coef, velocity_uncond, guidance_scale)
    checks.latents("prev_sample", prev_sample, like=velocity)
    check_density(coef)
    dtype = checks.compute_dtype(velocity, sample, prev_sample, velocity_uncond, coef.a)
    chosen = backends.select("sde_log_prob", backend, velocity.device, dtype, BACKENDS)
    guidance = float(guidance_scale)
    if chosen != "reference":
        log_prob: Tensor = fused.sde_log_prob(
            chosen, velocity, sample, prev_sample, coef.operands(), velocity_uncond, guidance
        )
        return log_prob
    return reference.sde_log_prob(
        velocity,
        ordinary(sample),
        ordinary(prev_sample),
        ordinary(coef),
        ordinary(velocity_uncond),
        guidance,
        dtype,
    )


def check_velocities(
    velocity: Tensor,
    sample: Tensor,
    coef: SDECoefficients,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
) -> None:
    """Checks shared by the ops that evaluate an SDE step."""
    checks.latents("velocity", velocity)
    checks.latents("sample", sample, like=velocity)
    if not isinstance(coef, SDECoefficients):
        raise TypeError(f"coef: expected SDECoefficients, got {type(coef).__name__}")
    if coef.shape and coef.shape != velocity.shape[:1]:
        raise ValueError(
            f"coef: expected fields of shape [] or [{velocity.shape[0]}], got {list(coef.shape)}"
        )
    if coef.device != velocity.device:
        raise ValueError(f"coef: expected device {velocity.device}, got {coef.device}")
    checks.number("guidance_scale", guidance_scale)
    if velocity_uncond is not None:
        checks.latents("velocity_uncond", velocity_uncond, like=velocity)
    elif guidance_scale != 1.0:
        raise ValueError(
            f"velocity_uncond: expected a tensor for guidance_scale {guidance_scale}, got None"
        )


def check_density(coef: SDECoefficients) -> None:
    """Refuse coefficients whose transition has no density."""
    if coef.kind == "ode":
        raise ValueError("coef: expected a stochastic kind with a log_prob, got kind 'ode'")


def _seed_tensor(seed: Any, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected dtype torch.int64, got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed: expected one element, got shape {list(seed.shape)}")
        return checks.same_device("seed", seed, device)
    if isinstance(seed, bool) or not isinstance(seed, (int, numbers.Integral)):
        raise TypeError(f"seed: expected an int or an int64 tensor, got {type(seed).__name__}")
    value = int(seed)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"seed: expected a 64-bit integer, got {value}")
    return torch.full((1,), value, dtype=torch.int64, device=device)  # no copy from the host
