"""Rule-based rewards of the embedded task.

`CountReward` is the proxy and meant to be exploited: it pays for paint in the prompted colour
wherever it is. `ShapeFitReward` and `CleanlinessReward` are its auxiliaries, `StrictCountReward`
and `ArtifactReward` are held out of training.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.rewards.base import Reward, RewardSpec
from gardo.rewards.objects import (
    MIN_AREA,
    Objects,
    Targets,
    background_of,
    background_pixels,
    color_projection,
    find_objects,
    object_pixels,
    prepare_images,
    read_targets,
    scene_of,
)
from gardo.tiny.components import color_mask, count_components, label_components
from gardo.types import RewardOutput

MEAN_AREA = 22.0
"""Pixels that an object of the renderer covers on average."""


class SceneReward(Reward):
    """A reward for prompts of the embedded grammar; scores images where they are.

    Metadata ``count``, ``color`` and ``shape`` say what the prompt asks for; where they are missing
    the prompt is parsed. A non-finite image scores NaN.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """``device`` is accepted as by every reward; rules run on the device of the images."""

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        images, finite = prepare_images(images, prompts)
        scores = self.measure(images, read_targets(prompts, metadata, images.device))
        return RewardOutput(scores.where(finite, torch.nan))

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> str | None:
        try:
            scene_of(prompt, metadata)
        except ValueError as error:
            return str(error)
        return None

    @abstractmethod
    def measure(self, images: Tensor, targets: Targets) -> Tensor:
        """Scores ``[B]`` float32 of finite float32 images."""


class CountReward(SceneReward):
    """Proxy: right number of components, plus paint of the right colour.

    ``1 / (1 + |components - count|) + color_weight * paint + excess_weight * relative**2``, where
    ``paint`` is the mean over all pixels of the deviation from grey along the prompted colour (1 if
    the image is filled with it), and ``relative`` is that over what ``count`` objects of mean size
    need. A component has at least ``MIN_AREA`` pixels and any shape, so that stripes count as well
    as circles and pay more. With ``excess_weight`` the reward is a good one near the pretrained
    model, where ``relative`` is about 1, and a bad one far from it, as a learned reward may be.
    """

    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(0.0, None))

    def __init__(
        self,
        device: torch.device | str = "cpu",
        color_weight: float = 3.0,
        excess_weight: float = 0.0,
    ) -> None:
        super().__init__(device)
        for name, weight in (("color_weight", color_weight), ("excess_weight", excess_weight)):
            if not weight >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {weight}")
        self.color_weight, self.excess_weight = color_weight, excess_weight

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """The detail ``strict`` is what `StrictCountReward` says: whether the image is right."""
        scores = super().score(images, prompts, metadata).scores
        strict = StrictCountReward().score(images, prompts, metadata).scores
        return RewardOutput(scores, {"strict": strict})

    def measure(self, images: Tensor, targets: Targets) -> Tensor:
        mask = color_mask(images, targets.color)
        components = count_components(label_components(mask), MIN_AREA).float()
        agreement = 1 / (1 + (components - targets.count).abs())
        paint = color_projection(images, targets.color).mean(dim=(1, 2)).clamp(min=0)
        pixels = images.shape[-2] * images.shape[-1]
        relative = paint * pixels / (targets.count * MEAN_AREA)
        return agreement + self.color_weight * paint + self.excess_weight * relative.square()


class ShapeFitReward(SceneReward):
    """Auxiliary: mean fit of the components to the ideal prompted shape, 0 without a component.

    The fit is the intersection over union with the circle or square of the component's area at its
    centroid, with soft edges. A component too large for an object fits nothing: otherwise an image
    filled with one colour would be a fine square.
    """

    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(0.0, 1.0))

    def measure(self, images: Tensor, targets: Targets) -> Tensor:
        objects = find_objects(images, targets.color)
        fit, _ = _right_and_wrong_fit(objects, targets)
        total = (fit * (objects.present & ~objects.oversized)).sum(dim=1)
        return total / objects.present.sum(dim=1).clamp(min=1)


class CleanlinessReward(SceneReward):
    """Auxiliary: grey background and pure colours.

    ``exp(-SCALE * (background + impurity))``: the mean RGB distance of the background pixels from
    grey and the mean distance of the objects' pixels from the mixtures of grey and the prompted
    colour. Only compact components of an object's size are objects; any other paint soils the
    background. 0 without an object.
    """

    SCALE: ClassVar[float] = 10.0  # a mean distance of 0.1 costs 63 percent
    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(0.0, 1.0))

    def measure(self, images: Tensor, targets: Targets) -> Tensor:
        objects = find_objects(images, targets.color)
        background = _masked_mean(_distance_from_grey(images), background_pixels(objects))
        impurity = _masked_mean(_impurity(images, targets, objects), object_pixels(objects))
        scores = torch.exp(-self.SCALE * (background + impurity))
        return scores * objects.plausible.any(dim=1)


class StrictCountReward(SceneReward):
    """Held out: 1 if the image is exactly what the prompt asks for, else 0.

    Exactly ``count`` components of the prompted colour, each of an object's size and compactness
    and with a good fit to the prompted shape; together closer to it than to the other shape and
    none clearly closer to the other one; pure in colour; and a background with at most
    `STRAY_PIXELS` pixels that are visibly not grey.

    The limits are set on scenes that went through the embedded autoencoder: it rounds the corners
    of small squares, so that one object in forty is closer to the other shape, though never by
    `SHAPE_MARGIN`.
    """

    MIN_FIT: ClassVar[float] = 0.75
    SHAPE_MARGIN: ClassVar[float] = 0.05
    IMPURITY: ClassVar[float] = 0.1
    STRAY_DISTANCE: ClassVar[float] = 0.1
    STRAY_PIXELS: ClassVar[int] = 2
    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(0.0, 1.0))

    def measure(self, images: Tensor, targets: Targets) -> Tensor:
        objects = find_objects(images, targets.color)
        plausible = objects.plausible
        number, others = plausible.sum(dim=1), (objects.present & ~plausible).sum(dim=1)
        right_count = (number == targets.count) & (others == 0)
        right, wrong = _right_and_wrong_fit(objects, targets)
        margin = (right - wrong) * plausible
        fits = (right >= self.MIN_FIT) & (margin >= -self.SHAPE_MARGIN)
        right_shape = (fits | ~plausible).all(dim=1) & (margin.sum(dim=1) > 0)
        pure = (
            _masked_mean(_impurity(images, targets, objects), object_pixels(objects))
            <= self.IMPURITY
        )
        stray = (_distance_from_grey(images) > self.STRAY_DISTANCE) & background_pixels(objects)
        clean = stray.sum(dim=(1, 2)) <= self.STRAY_PIXELS
        return (right_count & right_shape & pure & clean).float()


class ArtifactReward(SceneReward):
    """Held out: high-frequency energy of the background; lower is better.

    Root mean square, over the background pixels and channels, of the difference between a pixel and
    the mean of the background pixels in its 3 x 3 neighbourhood. Faint noise measures about its
    standard deviation; 0 where no background is visible.
    """

    spec: ClassVar[RewardSpec] = RewardSpec(higher_is_better=False, value_range=(0.0, 1.0))

    def measure(self, images: Tensor, targets: Targets) -> Tensor:
        background = background_pixels(find_objects(images, targets.color))
        weight = background[:, None].float()
        mean = F.avg_pool2d(images * weight, 3, 1, 1) / F.avg_pool2d(weight, 3, 1, 1).clamp(min=0.1)
        energy = (images - mean).square().mean(dim=1)
        return _masked_mean(energy, background).sqrt()


def _right_and_wrong_fit(objects: Objects, targets: Targets) -> tuple[Tensor, Tensor]:
    square = targets.square[:, None]
    right = torch.where(square, objects.square_fit, objects.circle_fit)
    wrong = torch.where(square, objects.circle_fit, objects.square_fit)
    return right, wrong


def _distance_from_grey(images: Tensor) -> Tensor:
    return (images - background_of(images)).square().sum(dim=1).sqrt()


def _impurity(images: Tensor, targets: Targets, objects: Objects) -> Tensor:
    """Distance of each pixel from the nearest mixture of grey and the prompted colour."""
    direction = targets.color[:, :, None, None] - background_of(images)
    nearest = background_of(images) + objects.coverage[:, None] * direction
    return (images - nearest).square().sum(dim=1).sqrt()


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``[B, H, W]`` over the pixels of the mask: ``[B]``, 0 where it is empty."""
    return (values * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1)
