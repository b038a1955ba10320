"""The controller of the gated share."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from torch import Tensor

from gardo_kernels import checks

_GROWTH = 0.1
#: Of the fraction, by rule.
_BOUNDS = {"official": (0.02, 0.2), "paper": (0.0, 1.0)}


class AdaptiveFraction:
    """Share of the uncertain samples to gate, driven by the trend of the uncertainty.

    The fraction grows by a tenth when the mean uncertainty of an epoch is above the maximum of the
    last ``window`` epochs, shrinks by a tenth when it is below their minimum, and stays within
    ``[low, high]``. The unit of the uncertainty does not matter.

    Args:
        initial: the fraction before the first change.
        low, high: its bounds; None: those of the rule.
        window: number of epochs to compare with.
        rule: ``official``, that of the published code: it compares from the second epoch on, with
            the epochs there are; bounds 0.02 and 0.2; :func:`gate_samples` updates it with the mean
            of the U ``>= 0``. ``paper`` (arXiv 2512.24138): nothing changes before the window is
            full; bounds 0 and 1; :func:`gate_samples` updates it with the mean U of all valid
            samples. That mean is always 0 but with ``ties="strict"``: use it with these.

    Raises:
        TypeError, ValueError: wrong type or value.
    """

    def __init__(
        self,
        initial: float = 0.1,
        low: float | None = None,
        high: float | None = None,
        window: int = 20,
        rule: str = "official",
    ) -> None:
        self._rule = checks.choice("rule", rule, tuple(_BOUNDS))
        lowest, highest = _BOUNDS[rule]
        self._low = checks.number("low", lowest if low is None else low, low=0.0, high=1.0)
        highest = highest if high is None else high
        self._high = checks.number("high", highest, low=self._low, high=1.0)
        self._fraction = checks.number("initial", initial, low=self._low, high=self._high)
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(f"window: expected an int, got {type(window).__name__}")
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        self._window = window
        self._history: deque[float] = deque(maxlen=window)

    @property
    def fraction(self) -> float:
        """The current fraction."""
        return self._fraction

    @property
    def rule(self) -> str:
        """``official`` or ``paper``."""
        return self._rule

    def update(self, mean_uncertainty: float | Tensor) -> float:
        """Take in an epoch's ``mean_uncertainty`` and return the fraction to gate it with."""
        mean = float(mean_uncertainty)
        if not math.isfinite(mean):
            raise ValueError(f"mean_uncertainty: expected a finite number, got {mean}")
        needed = self._window if self._rule == "paper" else 1
        if len(self._history) >= needed:
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
        self._history = deque(map(float, state["history"]), maxlen=self._window)
