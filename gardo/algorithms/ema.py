"""Exponential moving average of the policy's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gardo.config import TrainConfig
from gardo.models.adapters import load_exactly


class EMA:
    """Average ``decay * average + (1 - decay) * weights``, taken every ``ema_every`` updates."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        self.parameters = parameters
        self.decay, self.every = config.ema_decay, config.ema_every
        self.steps = 0
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Count an optimizer step and average when it is due."""
        self.steps += 1
        if self.steps % self.every == 0:
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the average into the model inside the block; the live weights come back exactly."""
        with torch.no_grad():
            live = {name: p.detach().clone() for name, p in self.parameters.items()}
            load_exactly(self.parameters, self.average, "average")
        try:
            yield
        finally:
            with torch.no_grad():
                load_exactly(self.parameters, live, "live weights")

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.average, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        average = {name: t for name, t in state.items() if name != "steps"}
        load_exactly(self.average, average, "average")
        self.steps = int(state["steps"])
