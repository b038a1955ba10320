"""How strong the KL penalty is: a weight that is fixed, or holds its gradient's share.

``kl_coef`` has no unit that methods and rewards share; the ratio of the two gradients has.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from gardo.config import AlgorithmConfig

_WINDOW = 5


class KLStrength:
    """The weight of the KL penalty: a fixed one, or one that holds its gradient's share.

    For a share it is ``target / (mean ratio of the last epochs)``, where a ratio is the norm of the
    KL's gradient at weight 1 over that of the policy's. It is 0 where the policy is the reference
    or no sample is gated; until one is above 0, the weight is 0.

    Attributes:
        coefficient: the weight.
    """

    def __init__(self, config: AlgorithmConfig) -> None:
        self.target = config.kl_target
        fixed = config.kl_coef
        self.coefficient = fixed if isinstance(fixed, float) else 0.0
        self._ratios: deque[float] = deque(maxlen=_WINDOW)

    def observe(self, policy: float, kl: float) -> dict[str, float]:
        """Take in an epoch's norms: of the policy's gradient, and of the KL's at weight 1.

        Returns:
            metrics of the weight that holds from now on; the share is NaN where it has no meaning.
        """
        ratio = kl / policy if policy > 0 else math.nan
        if self.target is not None:
            if math.isfinite(ratio):
                self._ratios.append(ratio)
            self._set()
        metrics = {"kl/gradient_share": self.coefficient * ratio}
        return metrics if self.target is None else {**metrics, "kl/coef": self.coefficient}

    def _set(self) -> None:
        mean = sum(self._ratios) / max(len(self._ratios), 1)
        if self.target is not None and mean > 0:
            self.coefficient = self.target / mean

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers (JSON-able)."""
        return {"ratios": list(self._ratios)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the target stays that of this object."""
        self._ratios = deque(map(float, state["ratios"]), maxlen=_WINDOW)
        self._set()
