"""When the reference policy is reset to the current one, and when it had better not be."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.config import ReferenceConfig


class AdaptiveReference:
    """Decides after each epoch whether the reference becomes the current policy.

    Attributes:
        refused: whether a reset was due after the last epoch and the guard refused it.
    """

    def __init__(self, config: ReferenceConfig) -> None:
        self.config = config
        self.epochs_since_reset = self.steps_since_reset = 0
        self.refused = False
        self.guard = ResetGuard(config) if config.guard else None

    def update(
        self,
        kl: float | None,
        scores: Tensor | None = None,
        uncertainty: Tensor | None = None,
        steps: int = 0,
    ) -> bool:
        """Count an epoch and return whether to reset.

        Args:
            kl: what the threshold judges, e.g. the epoch's mean KL over gated samples; None if no
                sample was gated.
            scores: ``[1 + K, N]`` of the epoch's samples, over all processes: the proxy, then the
                auxiliary rewards, larger is better. The guard needs them; without one they may be
                None.
            uncertainty: ``[N]`` of the same samples against those of the base; None: the guard
                ranks them against each other.
            steps: optimizer steps that the epoch has made.
        """
        self.epochs_since_reset += 1
        self.steps_since_reset += steps
        if self.guard is not None:
            if scores is None:
                raise ValueError("scores: expected a tensor, because there is a guard, got None")
            self.guard.observe(scores, uncertainty)
        config = self.config
        threshold, period, limit = config.kl_threshold, config.reset_every, config.reset_steps
        too_far = threshold > 0 and kl is not None and kl > threshold
        too_old = period > 0 and self.epochs_since_reset >= period
        due = too_far or too_old or (limit > 0 and self.steps_since_reset >= limit)
        # a refused reset stays due: it is asked for again after the next epoch
        self.refused = due and self.guard is not None and not self.guard.trusts()
        if not due or self.refused:
            return False
        self.epochs_since_reset = self.steps_since_reset = 0
        if self.guard is not None:
            self.guard.accept()
        return True

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers (JSON-able)."""
        guard = None if self.guard is None else self.guard.state_dict()
        return {
            "epochs_since_reset": self.epochs_since_reset,
            "steps_since_reset": self.steps_since_reset,
            "guard": guard,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`. Raises ValueError if only one of the two has a guard."""
        saved = state.get("guard")
        if (saved is None) != (self.guard is None):
            on, off = ("this", "the saved one") if saved is None else ("the saved one", "this")
            raise ValueError(
                "algorithm.reference.guard: expected the setting of the saved run, but of the two "
                f"runs {on} has a guard and {off} has none"
            )
        self.epochs_since_reset = int(state["epochs_since_reset"])
        # newer than the other: an epoch had at least one
        self.steps_since_reset = int(state.get("steps_since_reset", self.epochs_since_reset))
        if self.guard is not None and saved is not None:
            self.guard.load_state_dict(saved)


class ResetGuard:
    """Trusts a policy whose worst disagreements are no worse than those of the reference.

    An addition to the published method, whose reference follows the policy into a flaw of the
    proxy; from then on the penalty defends the flaw. A policy that exploits a flaw shows in the
    tail of the uncertainty, the samples that the proxy over-rates most, long before any mean
    moves. Each epoch the guard keeps the mean of the largest uncertainties (``guard_share`` of
    all samples) and a digest of the auxiliary rewards. A reset is trusted if, over the last
    ``guard_window`` epochs,

    - that tail exceeds the lowest of any reference so far by at most ``guard_uncertainty``, and
    - the auxiliaries' win rate against the reference (how often a sample of the window beats one
      of the reference; ties count one half; mean over auxiliaries) is at least
      ``guard_win_rate``.

    The reference's samples are at first those of the first epoch, which it has drawn itself; then
    those of the window that earned the last reset. The lowest tail, not the last, is the measure,
    so that small losses of trust cannot add up.
    """

    def __init__(self, config: ReferenceConfig) -> None:
        self.config = config
        self._window: deque[_Epoch] = deque(maxlen=config.guard_window)
        self._trusted: list[_Epoch] = []
        self._lowest_tail = math.inf

    def observe(self, scores: Tensor, uncertainty: Tensor | None = None) -> None:
        """Take in an epoch, as in :meth:`AdaptiveReference.update`.

        The uncertainty, where none is given, is the proxy's win rate minus the mean win rate of the
        auxiliaries, over the batch, ties counting one half. A sample with a missing score is left
        out, and so is an epoch in which every sample misses one.

        Raises:
            ValueError: no auxiliary rewards.
        """
        if scores.dim() != 2 or len(scores) < 2:
            raise ValueError(f"scores: expected [1 + K, N] with K > 0, got {list(scores.shape)}")
        scores = scores.detach().double().cpu()
        valid = scores.isfinite().all(dim=0)
        if uncertainty is not None:
            uncertainty = uncertainty.detach().double().cpu()
            valid &= uncertainty.isfinite()
        scores = scores[:, valid]
        if scores.shape[1] == 0:
            return
        if uncertainty is None:
            rates = gk.win_rate(scores)
            uncertainty = rates[0] - rates[1:].mean(dim=0)
        else:
            uncertainty = uncertainty[valid]
        count = max(1, round(self.config.guard_share * len(uncertainty)))
        tail = float(uncertainty.topk(count).values.mean())
        digest = scores[1:].sort(dim=1).values[:, (_LEVELS * scores.shape[1]).long()]
        self._window.append((digest, tail))
        if not self._trusted:
            self.accept()

    def win_rate(self) -> float:
        """Of the window's samples against the reference's, by the auxiliary rewards."""
        now, reference = _digests(self._window), _digests(self._trusted).sort(dim=1).values
        below = torch.searchsorted(reference, now)
        not_above = torch.searchsorted(reference, now, right=True)
        return float((below + not_above).double().mean()) / (2 * reference.shape[1])

    def growth(self) -> float:
        """The tail of the window's uncertainty minus the lowest of any reference so far."""
        return _tail(self._window) - self._lowest_tail

    def trusts(self) -> bool:
        """Whether the reference may become the current policy; never before a full window."""
        return (
            len(self._window) == self._window.maxlen
            and self.growth() <= self.config.guard_uncertainty
            and self.win_rate() >= self.config.guard_win_rate
        )

    def accept(self) -> None:
        """The policy became the reference, and the window its samples."""
        self._trusted = list(self._window)
        self._lowest_tail = min(self._lowest_tail, _tail(self._trusted))

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers (JSON-able)."""
        return {
            "window": _plain(self._window),
            "trusted": _plain(self._trusted),
            "lowest_tail": self._lowest_tail if self._trusted else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the settings stay those of this object."""
        self._window = deque(_tensors(state["window"]), maxlen=self._window.maxlen)
        self._trusted = _tensors(state["trusted"])
        lowest = state["lowest_tail"]
        self._lowest_tail = math.inf if lowest is None else float(lowest)


# an epoch's auxiliary scores as 100 quantiles [K, 100] (a win rate needs no more), and its tail
_Epoch = tuple[Tensor, float]
_Epochs = deque[_Epoch] | list[_Epoch]
_LEVELS = (torch.arange(100) + 0.5) / 100


def _digests(epochs: _Epochs) -> Tensor:
    return torch.cat([digest for digest, _ in epochs], dim=1)


def _tail(epochs: _Epochs) -> float:
    return sum(tail for _, tail in epochs) / len(epochs)


def _plain(epochs: _Epochs) -> list[list[Any]]:
    return [[digest.tolist(), tail] for digest, tail in epochs]


def _tensors(plain: list[list[Any]]) -> list[_Epoch]:
    return [(torch.tensor(digest, dtype=torch.float64), float(tail)) for digest, tail in plain]
