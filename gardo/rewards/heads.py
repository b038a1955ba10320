"""The linear head that the aesthetic predictor and ImageReward share."""

from __future__ import annotations

from torch import Tensor, nn


class LinearHead(nn.Module):
    """Five linear layers without nonlinearity, as published; dropout keeps the layers' numbers.

    The keys of its state are ``layers.{0,2,4,6,7}.{weight,bias}``.
    """

    def __init__(self, width: int = 768) -> None:
        """Make a head for features of the given width."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """``[B, width]`` -> ``[B]``."""
        scores: Tensor = self.layers(features)
        return scores[:, 0]
