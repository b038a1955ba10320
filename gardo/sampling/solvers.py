"""Solvers for steps without noise, beyond Euler: second-order DPM-Solver++ (arXiv 2211.01095)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class MultistepTable:
    """Coefficients ``[num_steps]`` float32 of ``x' = carry*x + new*clean + old*clean_before``.

    ``clean = x - sigma*v`` is the sample that the velocity predicts, ``clean_before`` that of the
    step before.
    """

    sigma: Tensor
    carry: Tensor
    new: Tensor
    old: Tensor

    def clone(self) -> MultistepTable:
        """The same coefficients in memory of their own."""
        return MultistepTable(**{name: t.clone() for name, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return dict(vars(self))

    def step(
        self, index: int, sample: Tensor, velocity: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            index: of the step.
            sample: ``[B, ...]`` float32.
            velocity: ``[B, ...]``, guided.
            before: the clean sample of the step before; None at the first.

        Returns:
            the next sample and the clean sample, ``[B, ...]`` float32.
        """
        clean = sample - self.sigma[index] * velocity.float()
        out = self.carry[index] * sample + self.new[index] * clean
        if before is not None:
            out = out + self.old[index] * before
        return out, clean


def dpm2_table(sigmas: Tensor, device: torch.device) -> MultistepTable:
    """DPM-Solver++(2M) for flow matching, ``x_t = (1 - sigma)*x0 + sigma*noise``.

    With ``alpha = 1 - sigma``, ``lambda = log(alpha / sigma)``, a step from ``s`` to ``t``, and
    ``r`` the step before in units of this one, both in lambda (midpoint form)::

        x_t = sigma_t/sigma_s * x + alpha_t*(1 - exp(lambda_s - lambda_t)) * D
        D   = clean + (clean - clean_before) / (2*r)

    First order, which is Euler's step, at the start, where there is no step before, and at the end,
    where lambda is infinite. ``sigmas`` ``[num_steps + 1]`` descend from at most 1 to 0.
    """
    values: Sequence[float] = sigmas.double().tolist()
    rows: list[tuple[float, float, float]] = []
    for i, (s, t) in enumerate(pairwise(values)):
        gain = (1 - t) - (1 - s) * t / s
        weight = 0.0
        if i > 0 and t > 0:
            ratio = (_lambda(s) - _lambda(values[i - 1])) / (_lambda(t) - _lambda(s))
            weight = 1 / (2 * ratio)
        rows.append((t / s, gain * (1 + weight), -gain * weight))
    table = torch.tensor(rows, dtype=torch.float64).float().to(device)
    return MultistepTable(sigmas[:-1].float().to(device), *table.unbind(1))


def _lambda(sigma: float) -> float:
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf
