"""A small preference model of scenes, an auxiliary reward of the embedded task.

It is trained on noisy comparisons of rendered images (`tools.tiny.preference_training`), apart from
the diffusion model and from the judge, and has two heads on one body. The blind one knows colour
and drawing, of scenes that nobody exploits; the sharp one also saw images with a wrong number
of objects and with too much paint. Mixing the two gives an ensemble any sight between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from gardo.tiny.scenes import CELLS, COLORS, NUMBERS, SHAPES, Scene

SHIPPED_PREFERENCE = Path(__file__).with_name("preference")


@dataclass(frozen=True)
class PreferenceConfig:
    """Sizes of the network: channels of the four convolutions and width of the hidden layers."""

    channels: tuple[int, int, int, int] = (16, 32, 40, 40)
    features: int = 48


class PreferenceModel(nn.Module):
    """Four convolutions over the image and the prompted colour, two heads."""

    def __init__(self, config: PreferenceConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PreferenceConfig()
        layers = convolutions(3 + 3, config.channels)
        half = len(layers) // 2
        self.near, self.far = nn.Sequential(*layers[:half]), nn.Sequential(*layers[half:])
        # the blind head looks at windows of five pixels, which fit into an object, and averages
        # over those that matter to it: it tells how things look, not how many or how large they are
        width = config.channels[half // 3 - 1]
        self.attention = nn.Conv2d(width, 1, 1)
        self.blind = _Head(width, config.features)
        self.sharp = _Head(config.channels[-1] * CELLS * CELLS, config.features)

    def forward(self, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Score images for what was asked.

        Args:
            images: ``[B, 3, IMAGE_SIZE, IMAGE_SIZE]`` floating point in [0, 1], on the model's
                device.
            scenes: ``B`` scenes with counts up to nine, what each prompt asks for.

        Returns:
            ``[B, 2]`` float32, the blind and the sharp preference. Of rendered scenes each has mean
            0 and variance 1.

        Raises:
            ValueError: another shape.
        """
        check_size(images)
        number = self.attention.weight.new_tensor
        count = number([scene.count for scene in scenes]).long() - 1
        shape = number([SHAPES.index(scene.shape) for scene in scenes]).long()
        color = number([COLORS[scene.color] for scene in scenes]).view(-1, 3, 1, 1)
        planes = [images.to(color.dtype), color.expand_as(images)]
        asked = F.one_hot(count, len(NUMBERS))
        near = self.near(torch.cat(planes, dim=1) * 2 - 1)
        weight = self.attention(near).flatten(1).softmax(dim=1)
        seen = (near.flatten(2) * weight[:, None]).sum(dim=2)
        layout = F.adaptive_avg_pool2d(self.far(near), CELLS).flatten(1)
        return torch.cat([self.blind(seen, asked, shape), self.sharp(layout, asked, shape)], dim=1)


class _Head(nn.Module):
    """A hidden layer that also sees the number asked for, and a score for each shape asked for."""

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs + len(NUMBERS), features)
        self.score = nn.Linear(features, len(SHAPES))

    def forward(self, seen: Tensor, number: Tensor, shape: Tensor) -> Tensor:
        scores = self.score(F.silu(self.hidden(torch.cat([seen, number], dim=1))))
        return scores.gather(1, shape[:, None])


def save_preference(model: PreferenceModel, folder: Path | str, record: Mapping[str, Any]) -> None:
    """Write ``model.safetensors`` (float16) and ``config.json`` (sizes and ``record``)."""
    save_network(model, folder, {"config": asdict(model.config), **record})


def load_preference(
    folder: Path | str = SHIPPED_PREFERENCE, device: torch.device | str = "cpu"
) -> PreferenceModel:
    """Load a preference model in float32, in evaluation mode and without gradients.

    Raises:
        UserError: a file of the folder is missing.
        RuntimeError: the weights do not fit the recorded sizes.
    """
    sizes = read_record("preference", folder)["config"]
    model = PreferenceModel(PreferenceConfig(tuple(sizes["channels"]), sizes["features"]))
    return load_weights(model, folder).to(device)
