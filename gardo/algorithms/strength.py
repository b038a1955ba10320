"""How strong the KL penalty is: a weight that is fixed, or holds its gradient's share.

``kl_coef`` has no unit that methods and rewards share; the ratio of the two gradients has.
"""

from __future__ import annotations

import math
from typing import Any

from gardo.config import AlgorithmConfig


class KLStrength:
    """The weight of the KL penalty: a fixed one, or one that holds its gradient's share.

    For a share it is set anew each epoch, to ``target / ratio``: the norm of the KL's gradient at
    weight 1 over that of the policy's. An epoch whose ratio is 0 (the policy is the reference, or
    no sample is gated) or unknown keeps the weight of the one before; before the first one above 0
    it is 0.

    Attributes:
        coefficient: the weight.
    """

    def __init__(self, config: AlgorithmConfig) -> None:
        self.target = config.kl_target
        fixed = config.kl_coef
        self.coefficient = fixed if isinstance(fixed, float) else 0.0

    def observe(self, policy: float, kl: float) -> dict[str, float]:
        """Take in an epoch's norms: of the policy's gradient, and of the KL's at weight 1.

        Returns:
            metrics of the weight that holds from now on; the share is NaN where it has no meaning.
        """
        ratio = kl / policy if policy > 0 else math.nan
        if self.target is not None and math.isfinite(ratio) and ratio > 0:
            self.coefficient = self.target / ratio
        metrics = {"kl/gradient_share": self.coefficient * ratio}
        return metrics if self.target is None else {**metrics, "kl/coef": self.coefficient}

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers (JSON-able)."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the target stays that of this object."""
        self.coefficient = float(state["coefficient"])
