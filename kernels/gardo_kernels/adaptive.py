"""The controller of the gated share."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from torch import Tensor

from gardo_kernels import checks

_GROWTH = 0.1


class AdaptiveFraction:
    """Share of the uncertain samples to gate, driven by the trend of the uncertainty.

    The first update keeps ``initial``. Then the fraction grows by a tenth when the mean of the
    non-negative uncertainties is above the maximum of the last ``window`` epochs, shrinks by a
    tenth when it is below their minimum, and stays within ``[low, high]``. The unit of the
    uncertainty does not matter.
    """

    def __init__(
        self, initial: float = 0.1, low: float = 0.02, high: float = 0.2, window: int = 20
    ) -> None:
        self._low = checks.number("low", low, low=0.0, high=1.0)
        self._high = checks.number("high", high, low=self._low, high=1.0)
        self._fraction = checks.number("initial", initial, low=self._low, high=self._high)
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(f"window: expected an int, got {type(window).__name__}")
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        self._history: deque[float] = deque(maxlen=window)

    @property
    def fraction(self) -> float:
        """The current fraction."""
        return self._fraction

    def update(self, mean_uncertainty: float | Tensor) -> float:
        """Take in an epoch's ``mean_uncertainty`` and return the fraction to gate it with."""
        mean = float(mean_uncertainty)
        if not math.isfinite(mean):
            raise ValueError(f"mean_uncertainty: expected a finite number, got {mean}")
        if self._history:
            if mean > max(self._history):
                self._fraction *= 1 + _GROWTH
            elif mean < min(self._history):
                self._fraction *= 1 - _GROWTH
        self._fraction = min(max(self._fraction, self._low), self._high)
        self._history.append(mean)
        return self._fraction

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers (JSON-able)."""
        return {"fraction": self._fraction, "history": list(self._history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; bounds and window stay those of this object."""
        expected = {"fraction", "history"}
        if set(state) != expected:
            raise ValueError(f"state: expected keys {sorted(expected)}, got {sorted(state)}")
        self._fraction = float(state["fraction"])
        self._history = deque(map(float, state["history"]), maxlen=self._history.maxlen)
