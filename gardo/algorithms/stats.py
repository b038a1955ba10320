"""The figures of an epoch's updates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.distributed.process import Runtime

Loss = gk.GRPOLoss | gk.NFTLoss
"""Sums over a micro-batch: ``loss`` is ``policy_loss`` plus the weighted ``kl``."""


@dataclass
class UpdateStats:
    """Sums over an epoch's updates, kept on the device until `metrics` reads them once.

    Attributes:
        judged_by: which KL `metrics` hands to the adaptive reference: ``epoch``, the mean over the
            gated samples; ``update``, the largest KL term that an optimizer step had in its loss.
        grad_norm: of each step made.
    """

    judged_by: str = "epoch"
    grad_norm: list[Tensor] = field(default_factory=list)
    _counts: list[tuple[int, int]] = field(default_factory=list)  # of each call
    _sums: list[Tensor] = field(default_factory=list)
    _ends: list[int] = field(default_factory=list)  # calls up to the end of each step made
    _first_deviations: list[Tensor] = field(default_factory=list)

    def add(
        self,
        out: Loss,
        size: int,
        gated: int,
        kl_weight: float,
        clip_range: float | tuple[float, float],
        advantage: Tensor | None = None,
    ) -> None:
        """Add the sums over a micro-batch, of which ``size`` rows are no padding.

        Args:
            advantage: ``[B]``, for the clip fractions by its sign.
        """
        sums = [out.policy_loss, out.loss, out.kl, out.kl * kl_weight]
        if isinstance(out, gk.GRPOLoss):
            ratio = out.ratio[:size]
            deviation = (ratio - 1).abs()
            if not self.grad_norm:  # the policy is still the one that sampled
                self._first_deviations.append(deviation.max() if size else deviation.sum())
            outside = _outside(ratio, clip_range)
            sign = torch.zeros_like(ratio) if advantage is None else advantage[:size]
            above, below = sign > 0, sign < 0
            counted = torch.stack([outside, above, outside & above, below, outside & below])
            sums += [deviation.sum(), *counted.sum(1)]
        self._sums.append(torch.stack([value.detach().double() for value in sums]))
        self._counts.append((size, gated))

    def finish_update(self, grad_norm: Tensor) -> None:
        """Close an optimizer step."""
        self.grad_norm.append(grad_norm.detach())
        self._ends.append(len(self._sums))

    def losses_finite(self) -> Tensor:
        """Whether all losses since the last step are finite, on this process; 0-d bool."""
        return torch.stack(self._sums[self._made :])[:, 1].isfinite().all()

    def drop_update(self) -> None:
        """Forget the calls since the last step, which is not followed by another one."""
        del self._sums[self._made :], self._counts[self._made :]
        if not self.grad_norm:
            self._first_deviations.clear()

    @property
    def _made(self) -> int:
        return self._ends[-1] if self._ends else 0

    def metrics(self, runtime: Runtime) -> tuple[dict[str, float], float | None]:
        """The epoch's figures over all processes, and the KL that the reference is judged by.

        The latter is None if no sample was gated. Updates that were left out do not count; if all
        were, the figures are NaN.
        """
        if not self.grad_norm:
            return dict.fromkeys(("loss/policy", "loss/total", "kl", "grad_norm"), math.nan), None
        sums = torch.stack(self._sums)
        counts = torch.tensor(self._counts, dtype=sums.dtype, device=sums.device)
        starts = [0, *self._ends[:-1]]
        calls = zip(starts, self._ends, strict=True)
        columns = torch.cat([counts, sums], 1)
        updates = runtime.sum(torch.stack([columns[a:b].sum(0) for a, b in calls]))
        # samples and gated ones are counted once per trained step, as they are in the sums
        samples, gated, policy, total, kl, _, *ratios = updates.sum(0).tolist()
        mean = kl / gated if gated else None
        figures = {
            "loss/policy": policy / samples,
            "loss/total": total / samples,
            "kl": 0.0 if mean is None else mean,
            # the largest of an update, as it is in the loss
            "kl/loss": float((updates[:, 5] / updates[:, 0]).max()),
        }
        if self._first_deviations:
            deviation = runtime.max(torch.stack(self._first_deviations).max())
            distance, clipped, *signed = ratios
            figures["clip_fraction"] = clipped / samples
            for sign, (count, outside) in zip(
                ("positive", "negative"), (signed[:2], signed[2:]), strict=True
            ):
                figures[f"clip_fraction/{sign}"] = outside / count if count else math.nan
            figures["ratio/max_abs_dev"] = float(deviation)
            figures["ratio/mean_abs_dev"] = distance / samples
        figures["grad_norm"] = float(torch.stack(self.grad_norm).mean())
        if mean is None or self.judged_by == "epoch":
            return figures, mean
        return figures, figures["kl/loss"]


def _outside(ratio: Tensor, clip_range: float | tuple[float, float]) -> Tensor:
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    return (ratio < 1 - low) | (ratio > 1 + high)
