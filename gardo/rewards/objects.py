"""What the rewards of the embedded task measure: the objects of an image and its background.

An object is a connected component of the prompted colour. Its soft edge belongs to it: the pixels
around a component count by their coverage, the share of the prompted colour in their mixture with
the background, so that anti-aliased and slightly blurred objects measure as they were drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.tiny.components import SENSIBLE_AREA, color_mask, label_components
from gardo.tiny.scenes import BACKGROUND, COLORS, SHAPES, Scene, parse_prompt

# Mean squared distance from the centroid over area: 0.159 for a disc, 0.167 for a square, 0.21 for
# a rectangle twice as long as wide, 0.42 for a 2 x 10 stripe.
MAX_SPREAD = 0.24
MIN_AREA = 3  # smaller components are specks, not objects drawn badly


@dataclass(frozen=True)
class Targets:
    """What the prompts of a batch ask for.

    Attributes:
        count: ``[B]`` float32.
        color: ``[B, 3]`` float32.
        square: ``[B]`` bool, squares or else circles.
    """

    count: Tensor
    color: Tensor
    square: Tensor


@dataclass(frozen=True)
class Objects:
    """Components of the prompted colour; column ``i`` belongs to the label ``i + 1``.

    Attributes:
        labels: ``[B, H, W]`` int64, the component of each pixel and of the pixels around it;
            0 elsewhere.
        coverage: ``[B, H, W]`` float32 in [0, 1], share of the prompted colour in each pixel.
        present: ``[B, H * W]`` bool, components of at least ``MIN_AREA`` pixels.
        oversized: ``[B, H * W]`` bool, components larger than any object.
        plausible: ``[B, H * W]`` bool, present ones of an object's size and compactness.
        circle_fit, square_fit: ``[B, H * W]`` float32, intersection over union with the ideal
            shape of the same area at the same centroid.
    """

    labels: Tensor
    coverage: Tensor
    present: Tensor
    oversized: Tensor
    plausible: Tensor
    circle_fit: Tensor
    square_fit: Tensor


def scene_of(prompt: str, metadata: Mapping[str, Any]) -> Scene:
    """The scene that a prompt asks for: from the metadata, or else read from the text.

    Raises:
        ValueError: metadata out of range, or none and a prompt outside the grammar.
    """
    if not {"count", "color", "shape"} <= metadata.keys():
        return parse_prompt(prompt)
    count, color, shape = metadata["count"], metadata["color"], metadata["shape"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"metadata of {prompt!r}: count: expected an integer >= 1, got {count!r}")
    if color not in COLORS:
        raise ValueError(f"metadata of {prompt!r}: color: expected {tuple(COLORS)}, got {color!r}")
    if shape not in SHAPES:
        raise ValueError(f"metadata of {prompt!r}: shape: expected {SHAPES}, got {shape!r}")
    return Scene(count, color, shape)


def read_targets(
    prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], device: torch.device
) -> Targets:
    """The targets of ``B`` prompts as tensors on ``device``.

    Raises:
        ValueError: different lengths, or a prompt that `scene_of` refuses.
    """
    if len(prompts) != len(metadata):
        raise ValueError(f"metadata: expected {len(prompts)} records, got {len(metadata)}")
    scenes = [scene_of(*pair) for pair in zip(prompts, metadata, strict=True)]
    return Targets(
        count=torch.tensor([float(scene.count) for scene in scenes], device=device),
        color=torch.tensor([COLORS[scene.color] for scene in scenes], device=device).view(-1, 3),
        square=torch.tensor(
            [scene.shape == "square" for scene in scenes], dtype=torch.bool, device=device
        ),
    )


def prepare_images(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Check a batch and make it safe to measure.

    Args:
        images: ``[B, 3, H, W]`` floating point in [0, 1].
        prompts: ``B`` texts.

    Returns:
        The images in float32 with non-finite images blanked out, and ``[B]`` bool: which images
        are finite.

    Raises:
        TypeError: the images are not floating point.
        ValueError: a shape or length is not as above.
    """
    check_images(images)
    if len(prompts) != len(images):
        raise ValueError(f"prompts: expected {len(images)} prompts, got {len(prompts)}")
    return finite_images(images)


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of images.

    Raises:
        TypeError: not floating point.
        ValueError: not of shape ``[B, 3, H, W]``.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected shape [B, 3, H, W], got {list(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected a floating point dtype, got {images.dtype}")


def finite_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images in float32 with non-finite ones blanked out, and ``[B]`` bool: which are finite."""
    finite = images.isfinite().flatten(1).all(dim=1)
    return images.float().where(finite[:, None, None, None], BACKGROUND[0]), finite


def background_of(images: Tensor) -> Tensor:
    """The background colour as ``[1, 3, 1, 1]`` like ``images``."""
    return images.new_tensor(BACKGROUND).view(1, 3, 1, 1)


def color_projection(images: Tensor, colors: Tensor) -> Tensor:
    """Deviation of each pixel from the background along the direction of a colour.

    Args:
        images: ``[B, 3, H, W]``.
        colors: ``[B, 3]``.

    Returns:
        ``[B, H, W]``: 0 for the background, 1 for the colour, negative for its opposite.
    """
    direction = colors[:, :, None, None] - background_of(images)
    return ((images - background_of(images)) * direction).sum(1) / direction.square().sum(1)


def find_objects(images: Tensor, colors: Tensor) -> Objects:
    """Find and measure the components of the given colour.

    Args:
        images: ``[B, 3, H, W]`` float32 in [0, 1], finite.
        colors: ``[B, 3]``, one colour for each image.
    """
    mask = color_mask(images, colors)
    labels = label_components(mask)
    pixels = _sum_by_label(mask.float(), labels)
    labels = grow(labels)
    coverage = color_projection(images, colors).clamp(0, 1)

    height, width = labels.shape[1:]
    y = torch.arange(height, device=images.device, dtype=torch.float32)[:, None]
    x = torch.arange(width, device=images.device, dtype=torch.float32)
    area = _sum_by_label(coverage, labels)
    safe_area = area.clamp(min=1e-6)
    center_y = _sum_by_label(coverage * y, labels) / safe_area
    center_x = _sum_by_label(coverage * x, labels) / safe_area
    dy = (y - _at_pixels(center_y, labels)).abs()
    dx = (x - _at_pixels(center_x, labels)).abs()
    squared = dy.square() + dx.square()
    spread = _sum_by_label(coverage * squared, labels) / safe_area.square()

    # ideal shapes of the same area, anti-aliased as the renderer does it
    size = _at_pixels(area, labels).sqrt()
    circle = (size / math.sqrt(math.pi) - squared.sqrt() + 0.5).clamp(0, 1)
    square = (size / 2 - dy + 0.5).clamp(0, 1) * (size / 2 - dx + 0.5).clamp(0, 1)

    def fit(ideal: Tensor) -> Tensor:
        common = _sum_by_label(torch.minimum(coverage, ideal), labels)
        return common / (2 * area - common).clamp(min=1e-6)

    low, high = SENSIBLE_AREA
    present = pixels >= MIN_AREA
    oversized = area > high
    plausible = present & (area >= low) & ~oversized & (spread <= MAX_SPREAD)
    return Objects(labels, coverage, present, oversized, plausible, fit(circle), fit(square))


def object_pixels(objects: Objects) -> Tensor:
    """``[B, H, W]`` bool: plausible objects with their soft edges."""
    return _at_pixels(objects.plausible.float(), objects.labels) > 0


def background_pixels(objects: Objects) -> Tensor:
    """``[B, H, W]`` bool: what is not within two pixels of a plausible object.

    Smears and stripes are no plausible objects, so they stay part of the background.
    """
    return grow(object_pixels(objects).long()) == 0


def grow(labels: Tensor) -> Tensor:
    """Give the pixels around labelled ones their label (the larger one where two meet)."""
    # maxima of shifted views: ten times as fast on a CPU as max pooling, which knows no integers
    padded = F.pad(labels, (1, 1, 1, 1))
    rows = torch.maximum(torch.maximum(padded[:, :-2], padded[:, 2:]), padded[:, 1:-1])
    around = torch.maximum(torch.maximum(rows[..., :-2], rows[..., 2:]), rows[..., 1:-1])
    return torch.where(labels > 0, labels, around)


def _sum_by_label(values: Tensor, labels: Tensor) -> Tensor:
    """Sum ``[B, H, W]`` by label: ``[B, H * W]``, column ``i`` for the label ``i + 1``.

    Sums in fixed point: exact, hence the same on every device and in every order of addition.
    """
    fixed = (values * 65536).round().long().flatten(1)
    sums = fixed.new_zeros(fixed.shape[0], fixed.shape[1] + 1).scatter_add_(
        1, labels.flatten(1), fixed
    )
    return sums[:, 1:].float() / 65536


def _at_pixels(values: Tensor, labels: Tensor) -> Tensor:
    """Spread ``[B, H * W]`` values of components to their pixels, 0 where there is none."""
    return F.pad(values, (1, 0)).gather(1, labels.flatten(1)).view(labels.shape)
