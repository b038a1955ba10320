"""Watches a run's numbers: updates that are left out, alarms, collapse; says when it must end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gardo.config import Config
from gardo.distributed.process import Runtime
from gardo.types import UserError


class Outcome(Enum):
    """What became of an update: made, or left out and why."""

    MADE = "made"
    SCALED_DOWN = "left out by the loss scaler, which lowers its scale"
    BAD_LOSS = "a loss that is not finite"
    BAD_GRADIENT = "a gradient that is not finite"


@dataclass(frozen=True)
class Alarm:
    """A threshold on a figure of an epoch.

    Attributes:
        figure: what is compared, in words.
        advice: what it may mean and what may help.
        below: whether it sounds at or below the threshold, rather than at or above.
    """

    figure: str
    advice: str
    below: bool = False


_COLLAPSE = (
    "the images of a prompt become alike; stop, go back to an earlier checkpoint, and try a larger "
    "algorithm.kl_coef or gate, algorithm.diversity true, or a smaller train.learning_rate"
)
ALARMS = {
    "ratio": Alarm(
        "max |ratio - 1| of the first update",
        "sampling and training compute log-probs differently; give sampling.batch_size and "
        "train.batch_size the same value, or use a wider precision",
    ),
    "ratio_mean": Alarm(
        "mean |ratio - 1|",
        "the policy runs away within an epoch; try a smaller train.learning_rate or fewer "
        "train.updates_per_epoch",
    ),
    "clip_fraction": Alarm(
        "clip fraction of the updates after the first",
        "nearly every sample is clipped and teaches nothing; try a wider algorithm.clip_range, a "
        "smaller train.learning_rate or fewer train.updates_per_epoch",
    ),
    "kl": Alarm(
        "KL to the reference",
        "the policy is far from its reference; try a larger algorithm.kl_coef, a smaller "
        "train.learning_rate or algorithm.reference.reset_every",
    ),
    "grad_norm": Alarm(
        "gradient norm before clipping",
        "training becomes unstable; try a smaller train.learning_rate or algorithm.adv_clip",
    ),
    "reward_drop": Alarm(
        "fall of the mean proxy reward, in standard deviations of the first epoch,",
        "the policy gets worse at what it is trained on; try a smaller train.learning_rate",
    ),
    "reward_rise": Alarm(
        "rise of the mean proxy reward, in standard deviations of the first epoch,",
        "a rise like this is rarely earned; look at the images and at the held-out rewards",
    ),
    "missing": Alarm(
        "share of samples that a reward could not score",
        "look at the reward's server or its log (rewards.max_missing_share stops the run)",
    ),
    "diversity": Alarm("nearest-neighbour distance relative to the first epoch", _COLLAPSE, True),
    "image_variance": Alarm("image variance relative to the first epoch", _COLLAPSE, True),
}
"""The alarms by the key of ``health`` that has their threshold."""

_MEASURED = {
    "ratio": "ratio/max_abs_dev",
    "ratio_mean": "ratio/mean_abs_dev",
    "clip_fraction": "clip_fraction",
    "kl": "kl",
    "grad_norm": "grad_norm",
}
_OF_BASE = {"diversity": "diversity/nn_distance", "image_variance": "diversity/image_variance"}


class Health:
    """Counts updates that were left out, and compares each epoch with the alarms' thresholds.

    What collapse and rewards are compared with, the base, is the first epoch of the run: it is
    drawn before any update, by the policy as it came.

    Attributes:
        folder: of the run, where dumps go.
        say: tells the user a line.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config.health, runtime
        updates = config.train.updates_per_epoch
        # before the first one nothing has moved, so that no ratio is outside of the range
        self._clippable = (updates - 1) / updates if updates > 1 else 1.0
        self.folder = Path()
        self.say: Callable[[str], None] = lambda line: None
        self.skipped_in_a_row = 0
        self._skipped = self._scaled_down = 0  # in this epoch
        self._base: dict[str, float | None] = {}
        self._reached: dict[str, int] = {}  # alarm -> epochs in a row
        self._stopping: list[str] = []

    def attach(self, folder: Path, say: Callable[[str], None]) -> None:
        """Begin to train in a run folder."""
        self.folder, self.say = folder, say

    def count(self, outcome: Outcome, epoch: int, update: int) -> bool:
        """Count an update; returns whether too many in a row were left out."""
        if outcome is Outcome.MADE:
            self.skipped_in_a_row = 0
            return False
        where = f"epoch {epoch}, update {update}: left out"
        if outcome is Outcome.SCALED_DOWN:
            self._scaled_down += 1
            scale = self.runtime.accelerator.scaler.get_scale()
            self.say(f"{where} by the loss scaler, whose scale is now {scale:g}")
            return False
        self._skipped += 1
        self.skipped_in_a_row += 1
        limit = self.config.max_skipped_in_a_row
        self.say(f"{where}: {outcome.value} ({self.skipped_in_a_row} in a row, stops at {limit})")
        return self.skipped_in_a_row >= limit

    def observe(
        self, epoch: int, metrics: Mapping[str, float], scores: Tensor | None
    ) -> dict[str, Any]:
        """Take in a whole epoch and sound the alarms.

        Args:
            metrics: of the epoch.
            scores: ``[1 + K, N]`` of all processes' samples, the proxy first, larger is better, NaN
                where missing.

        Returns:
            further metrics. ``alarms`` names those that sound in this epoch, whether or not they
            have just begun.
        """
        figures = self._agreed(_figures(metrics, scores))
        if not self._base:
            self._base = {name: figures[name] for name in (*_OF_BASE, "proxy", "proxy_std")}
        values = {name: figures[name] for name in (*_MEASURED, "missing")}
        values["clip_fraction"] = _ratio(figures["clip_fraction"], self._clippable)
        values |= {name: _ratio(figures[name], self._base[name]) for name in _OF_BASE}
        rise = None
        if figures["proxy"] is not None and self._base["proxy"] is not None:
            rise = _ratio(figures["proxy"] - self._base["proxy"], self._base["proxy_std"])
        values |= {"reward_rise": rise, "reward_drop": None if rise is None else -rise}
        lines = {name: self._line(name, values[name]) for name in ALARMS}
        before = self._sounding()
        for name, line in lines.items():
            self._reached[name] = 0 if line is None else self._reached.get(name, 0) + 1
        sounding = self._sounding()
        for name in sounding:
            if name not in before:
                self.say(f"epoch {epoch}: {lines[name]}")
        for name in before:
            if name not in sounding:
                self.say(f"epoch {epoch}: alarm {name} is over")
        self._stopping = [line for n in sounding if n in self.config.stop_on and (line := lines[n])]
        skipped, scaled, self._skipped, self._scaled_down = self._skipped, self._scaled_down, 0, 0
        extra = {} if self.runtime.accelerator.scaler is None else {"health/scaled_down": scaled}
        return {
            "health/skipped_updates": skipped,
            "health/skipped_in_a_row": self.skipped_in_a_row,
            **extra,
            "health/alarms": len(sounding),
            "alarms": sounding,
        }

    def stop_if_alarmed(self) -> None:
        """UserError if an alarm of ``health.stop_on`` sounds after the last epoch observed."""
        if self._stopping:
            raise UserError(
                f"stopped by health.stop_on: {'; '.join(self._stopping)}. To go on all the same, "
                "change the threshold (null: off) or health.stop_on, and --resume "
                f"{self.folder}"
            )

    def _sounding(self) -> list[str]:
        return [name for name, n in self._reached.items() if n >= self.config.patience]

    def _line(self, name: str, value: float | None) -> str | None:
        """What the alarm says; None if its threshold is not reached."""
        threshold: float | None = getattr(self.config, name)
        if threshold is None or value is None:
            return None
        alarm = ALARMS[name]
        if not (value <= threshold if alarm.below else value >= threshold):
            return None
        side = "at or below" if alarm.below else "at or above"
        return (
            f"alarm {name}: {alarm.figure} is {value:.3g}, {side} health.{name} {threshold:g}: "
            f"{alarm.advice}"
        )

    def _agreed(self, figures: Mapping[str, float]) -> dict[str, float | None]:
        """The main process's figures, on all; None for those that are not finite or not there."""
        device = self.runtime.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        told = self.runtime.from_main(torch.tensor([*figures.values()], dtype=dtype, device=device))
        pairs = zip(figures, told.tolist(), strict=True)
        return {name: value if math.isfinite(value) else None for name, value in pairs}

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers (JSON-able)."""
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "base": self._base,
            "reached": self._reached,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; ValueError or KeyError if it is not one."""
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        base = dict(state["base"])
        self._base = {k: None if v is None else float(v) for k, v in base.items()}
        self._reached = {name: int(n) for name, n in dict(state["reached"]).items()}


def _figures(metrics: Mapping[str, float], scores: Tensor | None) -> dict[str, float]:
    """What alarms look at, NaN where it was not measured."""
    figures = {n: metrics.get(key, math.nan) for n, key in (_MEASURED | _OF_BASE).items()}
    figures["missing"] = max(
        (v for k, v in metrics.items() if k.startswith("reward/") and k.endswith("/missing")),
        default=math.nan,
    )
    proxy = torch.empty(0) if scores is None else scores[0].double()
    valid = proxy[proxy.isfinite()]
    # of no sample at all both are NaN
    figures["proxy"] = float(valid.mean())
    figures["proxy_std"] = float((valid - valid.mean()).square().mean().sqrt())
    return figures


def _ratio(value: float | None, base: float | None) -> float | None:
    """``value / base``; None where one is missing or the base is 0 and nothing can be told."""
    return None if value is None or not base else value / base
