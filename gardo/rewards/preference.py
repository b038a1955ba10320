"""The preference model of the embedded task as an auxiliary reward of any sight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gardo.rewards.networks import NetworkReward
from gardo.tiny.preference import SHIPPED_PREFERENCE, load_preference
from gardo.tiny.scenes import Scene


class PreferenceReward(NetworkReward):
    """Auxiliary: ``(1 - sight) * blind + sight * sharp``, the two heads of the preference model.

    Both are learned from noisy comparisons. The blind one sees colour and drawing, but not the
    number of objects nor how much is painted; the sharp one sees these, too. Of rendered
    scenes either has mean 0 and variance 1.
    """

    network = "preference model"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        sight: float = 1.0,
        path: Path | str = SHIPPED_PREFERENCE,
    ) -> None:
        """Load the model from ``path``, a folder with its weights and configuration.

        Raises:
            ValueError: ``sight`` outside [0, 1].
        """
        if not 0 <= sight <= 1:
            raise ValueError(f"sight: expected a number from 0 to 1, got {sight}")
        self.sight = sight
        self.model = load_preference(path, device)
        self.device = torch.device(device)

    def measure(self, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
        blind, sharp = self.model(images, scenes).unbind(dim=1)
        return (1 - self.sight) * blind + self.sight * sharp
