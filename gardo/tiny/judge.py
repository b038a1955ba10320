"""A small classifier of scenes, the held-out judge of the embedded task.

It is trained on rendered scenes alone (`tools.tiny.judge_training`), apart from the diffusion model
and from every reward, and tells the number, the colour and the shape of the objects. What is no
scene of the grammar (stripes, smears, half-drawn objects) has a class of its own. The penultimate
layer is the embedded task's image feature: because the network must also tell which cells of the
grid are occupied, it keeps the layout, so that its distances measure diversity.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gardo.tiny.networks import (
    check_size,
    convolutions,
    load_weights,
    read_record,
    save_network,
)
from gardo.tiny.scenes import CELLS, COLORS, NUMBERS, SHAPES

SHIPPED_JUDGE = Path(__file__).with_name("judge")


@dataclass(frozen=True)
class JudgeConfig:
    """Sizes of the network: channels of the four convolutions and width of the features."""

    channels: tuple[int, int, int, int] = (24, 48, 64, 64)
    features: int = 64


@dataclass
class JudgeOutput:
    """Logits and features of a batch, all float32.

    Attributes:
        count: ``[B, 10]``; class 0 is "no scene of the grammar", class n is n objects.
        color: ``[B, len(COLORS)]`` in the order of ``scenes.COLORS``.
        shape: ``[B, len(SHAPES)]`` in the order of ``scenes.SHAPES``.
        cells: ``[B, CELLS * CELLS]``, logit that the cell holds an object, row by row.
        features: ``[B, config.features]``, the penultimate layer.
    """

    count: Tensor
    color: Tensor
    shape: Tensor
    cells: Tensor
    features: Tensor


class Judge(nn.Module):
    """Four convolutions, one hidden layer, four linear heads."""

    def __init__(self, config: JudgeConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or JudgeConfig()
        # one value per channel and grid cell: pooling over the whole image would lose the layout
        self.body = nn.Sequential(
            *convolutions(3, config.channels), nn.AdaptiveAvgPool2d(CELLS), nn.Flatten()
        )
        self.hidden = nn.Linear(config.channels[-1] * CELLS * CELLS, config.features)
        self.heads = nn.ModuleDict(
            {
                "count": nn.Linear(config.features, len(NUMBERS) + 1),
                "color": nn.Linear(config.features, len(COLORS)),
                "shape": nn.Linear(config.features, len(SHAPES)),
                "cells": nn.Linear(config.features, CELLS * CELLS),
            }
        )

    def forward(self, images: Tensor) -> JudgeOutput:
        """Classify images.

        Args:
            images: ``[B, 3, IMAGE_SIZE, IMAGE_SIZE]`` floating point in [0, 1], on the judge's
                device.

        Raises:
            ValueError: another shape.
        """
        check_size(images)
        features = F.silu(self.hidden(self.body(images.to(self.hidden.weight.dtype) * 2 - 1)))
        logits = {name: head(features) for name, head in self.heads.items()}
        return JudgeOutput(**logits, features=features)


def save_judge(judge: Judge, folder: Path | str, record: Mapping[str, Any]) -> None:
    """Write ``model.safetensors`` (float16) and ``config.json`` (sizes and ``record``)."""
    save_network(judge, folder, {"config": asdict(judge.config), **record})


def load_judge(folder: Path | str = SHIPPED_JUDGE, device: torch.device | str = "cpu") -> Judge:
    """Load a judge in float32, in evaluation mode and without gradients.

    Raises:
        UserError: a file of the folder is missing.
        RuntimeError: the weights do not fit the recorded sizes.
    """
    sizes = read_record("judge", folder)["config"]
    judge = Judge(JudgeConfig(tuple(sizes["channels"]), sizes["features"]))
    return load_weights(judge, folder).to(device)


def shared_judge(folder: Path | str, device: torch.device | str) -> Judge:
    """`load_judge`, once per folder and device: the reward and the features share one network."""
    return _load_once(str(folder), str(device))


@functools.lru_cache(maxsize=4)
def _load_once(folder: str, device: str) -> Judge:
    return load_judge(folder, device)
