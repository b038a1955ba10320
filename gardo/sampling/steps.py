"""The steps of a trajectory: schedule, affine coefficients, and where there is noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.config import SamplingConfig
from gardo.models.base import Schedule
from gardo.rng import derive_seed
from gardo.sampling.solvers import MultistepTable, dpm2_table


@dataclass(frozen=True)
class StepTable:
    """The schedule with the affine coefficients of every step, on the device.

    Attributes:
        timesteps: ``[num_steps]`` float32.
        coefficients: one `SDECoefficients` per step (0-d fields).
        table: the same as ``[num_steps]`` fields of one kind: a step without noise has c = 0.
        stochastic: the steps with noise, in order; the only ones with a log-prob.
        trainable: the stochastic steps without the schedule's last, whose transition is so narrow
            that its log-prob says nothing.
        multistep: replaces the coefficients where a solver looks back at the step before.
    """

    timesteps: Tensor
    coefficients: tuple[gk.SDECoefficients, ...]
    table: gk.SDECoefficients
    stochastic: tuple[int, ...]
    trainable: tuple[int, ...]
    multistep: MultistepTable | None = None

    @property
    def num_steps(self) -> int:
        return len(self.coefficients)


def step_table(
    schedule: Schedule,
    device: torch.device,
    *,
    kind: str,
    noise_level: float,
    kl_scale: str = "exact",
    window: range | None = None,
    solver: str = "euler",
) -> StepTable:
    """Coefficients of every step: noisy inside ``window`` (None: everywhere), else ODE.

    ``solver`` is for kind ``ode`` alone: ``euler``, or ``dpm2`` for second order.
    """
    sigmas, coefficients, stochastic = schedule.sigmas, [], []
    for step in range(schedule.num_steps):
        noisy = kind != "ode" and (window is None or step in window)
        coefficients.append(
            gk.sde_coefficients(
                sigmas[step],
                sigmas[step + 1],
                noise_level=noise_level,
                kind=kind if noisy else "ode",
                sigma_max=sigmas[1],
                kl_scale=kl_scale,
            )
        )
        if noisy and float(coefficients[-1].c) > 0:
            stochastic.append(step)
    fields = [c.tensors() for c in coefficients]
    table = gk.SDECoefficients(
        **{name: torch.stack([f[name] for f in fields]) for name in fields[0]},
        kind=kind if stochastic else "ode",
    )
    return StepTable(
        schedule.timesteps.to(device),
        tuple(c.to(device) for c in coefficients),
        table.to(device),
        tuple(stochastic),
        tuple(step for step in stochastic if sigmas[step + 1] > 0),
        dpm2_table(sigmas, device) if solver == "dpm2" and kind == "ode" else None,
    )


def sde_window(config: SamplingConfig, seed: int, epoch: int) -> range | None:
    """The epoch's window of noisy steps; None without windows.

    A window of ``sde_window`` steps lies anywhere in ``sde_window_range``, as in Flow-GRPO-Fast
    and MixGRPO; both end where the schedule ends.
    """
    if config.sde_window == 0:
        return None
    size = min(config.sde_window, config.num_steps)
    low, high = config.sde_window_range or (0, max(size, config.num_steps // 2))
    high = min(high, config.num_steps)
    low = min(low, high - size)
    first = low + derive_seed(seed, "window", epoch) % (high - low - size + 1)
    return range(first, first + size)
