"""GARDO's shaping (arXiv 2512.24138): rewards to advantages and the gate, and what epochs leave."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.config import AlgorithmConfig
from gardo.types import UserError


class Shaped(NamedTuple):
    """What becomes of an epoch's rewards; figures are over all its samples.

    Attributes:
        advantage: ``[N]`` float32, 0 for a sample that lacks a value.
        gate: ``[N]`` bool, the samples that carry the KL penalty.
        uncertainty: ``[N]`` float64, U against the base's samples; None without an anchor.
        metrics: by name.
    """

    advantage: Tensor
    gate: Tensor
    uncertainty: Tensor | None
    metrics: dict[str, float]


class RewardShaper:
    """Shapes one epoch after the other, whose gate, scale and anchor depend on those before.

    Attributes:
        fraction: the controller of the gated share.
        scale: what advantages are divided by, with ``reward_scale: auto``; None until it is known.
        anchor: the first epoch's rewards, which the base has earned; None where nobody asks.
    """

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config
        # without a KL term there is nothing to gate
        self.gate_mode = config.gate.mode if config.has_kl else "off"
        fraction, gates = config.gate.fraction, self.gate_mode in ("paper", "official")
        self.fraction = (
            gk.AdaptiveFraction(fraction, rule=config.gate.adaptation)
            if config.gate.adaptive and gates
            else gk.AdaptiveFraction(fraction, low=fraction, high=fraction)
        )
        self.scale: float | None = None
        self.anchor: gk.Anchor | None = None

    def shape(
        self,
        proxy: Tensor,
        judges: Tensor,
        group_ids: Tensor,
        distance: Tensor | None = None,
        correct: Tensor | None = None,
    ) -> Shaped:
        """Shape the ``N`` samples of an epoch, of all processes.

        Args:
            proxy: ``[N]`` float64, the reward that is optimised.
            judges: ``[K, N]`` float64, whose win rates the proxy's is compared with.
            group_ids: int64 ``[N]``, one per prompt.
            distance: ``[N]`` to the nearest neighbour of the group; None: no diversity factor.
            correct: ``[N]``, 1 where a rule finds the sample right, 0 where wrong, NaN where it is
                silent; for the metric of what the cap does to right ones alone.
        """
        config = self.config
        # a sample that lacks a value takes no part
        valid = proxy.isfinite() & judges.isfinite().all(0)
        distance = None if distance is None or not config.diversity else distance.double()
        if distance is not None:
            valid &= distance.isfinite()
        proxy = torch.where(valid, proxy, torch.nan)
        uncertainty = self._against_base(proxy, judges) if config.needs_anchor else None
        metrics: dict[str, float] = {}
        earned = proxy
        if config.cap.mode == "on" and self.anchor is not None:
            earned = self.anchor.cap(proxy, judges, config.cap.percentile)
            metrics |= self._cap_metrics(earned < proxy, valid, correct)
        if config.diversity == "supported" and distance is not None and uncertainty is not None:
            supported = uncertainty <= self._allowance()
            distance = without_boost(distance, supported & valid, group_ids)
        advantage = gk.group_advantages(
            earned,
            group_ids,
            distance,
            norm=config.advantage_norm,
            diversity_scale=config.diversity_scale,
        )
        if config.reward_scale == "auto":
            advantage = advantage / self._reward_scale(proxy, group_ids, valid)
            metrics["reward_scale"] = self.scale or 0.0
        metrics["advantage/rms"] = float(_rms(advantage, valid))
        gate, gate_metrics = self._gate(proxy, judges, group_ids, valid, uncertainty)
        return Shaped(advantage.float(), gate, uncertainty, metrics | gate_metrics)

    def _against_base(self, proxy: Tensor, judges: Tensor) -> Tensor:
        """Uncertainty of samples that are ranked against the base's, which the first ones are."""
        if self.anchor is None:
            rewards = torch.cat([proxy[None], judges])
            if not bool(rewards.isfinite().all(0).any()):
                raise UserError(
                    "rewards: expected a sample with all its scores in the first epoch, with which "
                    "later ones are compared, got none"
                )
            self.anchor = gk.Anchor(rewards)
        return self.anchor.uncertainty(proxy, judges)

    def _allowance(self) -> Tensor:
        """The uncertainty that a sample may have, tau."""
        if self.anchor is None:
            raise ValueError("anchor: expected the base's rewards, got None")
        return self.anchor.threshold(1 - self.config.cap.percentile / 100)

    def _cap_metrics(
        self, capped: Tensor, valid: Tensor, correct: Tensor | None
    ) -> dict[str, float]:
        metrics = {
            "cap/share": float(capped.sum() / valid.sum().clamp(min=1)),
            "cap/tau": float(self._allowance()),
        }
        if correct is not None:
            right = valid & (correct > 0)
            metrics["cap/share_correct"] = float((capped & right).sum() / right.sum())
        return metrics

    def _reward_scale(self, proxy: Tensor, group_ids: Tensor, valid: Tensor) -> float:
        """RMS of the centred rewards of the first epoch that has a spread, for good."""
        if self.scale is None:
            found = float(_rms(gk.group_advantages(proxy, group_ids), valid))
            self.scale = found or None
        return self.scale or 1.0

    def _gate(
        self,
        proxy: Tensor,
        judges: Tensor,
        group_ids: Tensor,
        valid: Tensor,
        uncertainty: Tensor | None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The gate, bool ``[N]``, and its figures."""
        config, official = self.config.gate, self.gate_mode == "official"
        if config.anchor == "base" and self.anchor is not None and uncertainty is not None:
            drawn, threshold, mean = self._anchored(self.anchor, uncertainty, valid)
        else:
            _, drawn, threshold, mean = gk.gate_samples(
                proxy,
                judges,
                group_ids,
                self.fraction,
                side="under" if official else "over",
                ties=self.config.gate_ties,
                share_of=config.share_of,
                scope=config.scope,
            )
        gate = {"all": valid, "off": torch.zeros_like(valid)}.get(self.gate_mode, drawn)
        return gate, {
            "gate/fraction": self.fraction.fraction,
            "gate/share": float(gate.double().mean()),
            # by group, if each has its own
            "gate/threshold": float(threshold.mean()),
            "uncertainty/mean": float(mean),
        }

    def _anchored(
        self, anchor: gk.Anchor, uncertainty: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, threshold and mean uncertainty where the fraction is one of the base's samples."""
        config, over = self.config.gate, uncertainty >= 0
        counted = valid & over if config.adaptation == "official" else valid
        mean = torch.where(counted, uncertainty, 0.0).sum() / counted.sum().clamp(min=1)
        threshold = anchor.threshold(self.fraction.update(mean))
        return valid & (uncertainty > threshold), threshold, mean

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers (JSON-able); the anchor is kept apart."""
        return {**self.fraction.state_dict(), "reward_scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`, also one of a version without ``reward_scale``."""
        scale = state.get("reward_scale")
        self.scale = None if scale is None else float(scale)
        self.fraction.load_state_dict({k: v for k, v in state.items() if k != "reward_scale"})

    def anchor_state(self) -> dict[str, Tensor]:
        """The pool; nothing before the first epoch."""
        return {} if self.anchor is None else self.anchor.state_dict()

    def load_anchor(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Restore `anchor_state`."""
        self.anchor = gk.Anchor(state["pool"].to(device)) if state else None


def without_boost(distance: Tensor, supported: Tensor, group_ids: Tensor) -> Tensor:
    """Distances in which a sample that is not supported has at most its group's mean one.

    The mean is over the supported samples; in a group without any, over all that have a distance.

    Args:
        distance: ``[N]`` float64; NaN stays NaN.
        supported: ``[N]`` bool.
        group_ids: int64 ``[N]``.
    """
    group = group_ids.unique(return_inverse=True)[1]

    def mean(kept: Tensor) -> Tensor:
        zeros = distance.new_zeros(len(distance))
        total = zeros.index_add(0, group, torch.where(kept, distance, 0.0))
        return (total / zeros.index_add(0, group, kept.double()))[group]

    known = distance.isfinite()
    of_supported = mean(known & supported)
    neutral = torch.where(of_supported.isnan(), mean(known), of_supported)
    return torch.where(known & ~supported, torch.minimum(distance, neutral), distance)


def _rms(values: Tensor, valid: Tensor) -> Tensor:
    """Root of the mean square of the valid values; 0 without any."""
    square = torch.where(valid, values, 0.0).square().sum() / valid.sum().clamp(min=1)
    return square.sqrt()
