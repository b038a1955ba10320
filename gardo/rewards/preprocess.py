"""Image preprocessing on the device, equal to what the reference processors do with Pillow.

The models were trained on images that Pillow had resized. Pillow resizes bytes: first the rows,
then the columns, and rounds to a byte after each. Both passes are computed here with Pillow's own
integer weights in integers, hence to the bit, on any device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.rewards.objects import check_images

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as processor files hold them
_PRECISION_BITS = 22  # Pillow's fixed point: 32 bits less 8 of the pixel and 2 of headroom


@dataclass(frozen=True)
class ImageTransform:
    """Resize, centre crop, normalise.

    Attributes:
        size: an int is the length of the shorter side, a pair is (height, width).
        crop: (height, width) of the centre crop, None for none.
        filter: ``bicubic`` or ``bilinear``, both antialiased.
        mean, std: of the three channels, for values in [0, 1].
        as_bytes: resize bytes as Pillow does; otherwise floats, as torchvision does.
    """

    size: int | tuple[int, int] = 224
    crop: tuple[int, int] | None = (224, 224)
    filter: str = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    as_bytes: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """Preprocess ``[B, 3, H, W]`` in [0, 1] to ``[B, 3, h, w]`` float32, on its device."""
        images = images.float()
        size = target_size(images.shape[-2], images.shape[-1], self.size)
        if self.as_bytes:
            images = resize_bytes(to_bytes(images), size, self.filter).float() / 255
        elif size != tuple(images.shape[-2:]):
            images = F.interpolate(
                images, size, mode=self.filter, antialias=True, align_corners=False
            )
        if self.crop is not None:
            images = center_crop(images, self.crop)
        mean = torch.tensor(self.mean, device=images.device)[:, None, None]
        std = torch.tensor(self.std, device=images.device)[:, None, None]
        return (images - mean) / std


def transform_from_config(config: Mapping[str, Any], as_bytes: bool = True) -> ImageTransform:
    """The transform that a ``preprocessor_config.json`` describes.

    Raises:
        ValueError: it asks for a step that is not supported here.
    """
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(step) is False:  # null stands for the default
            raise ValueError(f"{step}: expected true, got false")
    if config.get("do_pad"):
        raise ValueError("do_pad: expected false, got true")
    given = {key: value for key, value in config.items() if value is not None}
    if given.get("rescale_factor", 1 / 255) != 1 / 255:
        raise ValueError(f"rescale_factor: expected 1/255, got {given['rescale_factor']}")
    resample = given.get("resample", 3)
    if resample not in FILTERS:
        raise ValueError(f"resample: expected 2 (bilinear) or 3 (bicubic), got {resample}")
    size = _size(given.get("size", 224))
    crop = None
    if given.get("do_center_crop", "crop_size" in given):
        side = _size(given.get("crop_size", 224))
        crop = (side, side) if isinstance(side, int) else side
    return ImageTransform(
        size=size,
        crop=crop,
        filter=FILTERS[resample],
        mean=tuple(given.get("image_mean", CLIP_MEAN)),
        std=tuple(given.get("image_std", CLIP_STD)),
        as_bytes=as_bytes,
    )


def check_batch(images: Tensor, prompts: Sequence[str]) -> None:
    """Refuse what is not a batch of images with a prompt each.

    Raises:
        TypeError: the images are not floating point.
        ValueError: not of shape ``[B, 3, H, W]``, or not ``B`` prompts.
    """
    check_images(images)
    if len(prompts) != len(images):
        raise ValueError(f"prompts: expected {len(images)} prompts, got {len(prompts)}")


def to_bytes(images: Tensor) -> Tensor:
    """Round images in [0, 1] to uint8, as saving to a file does."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def target_size(height: int, width: int, size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) after resizing; an int is the new length of the shorter side."""
    if not isinstance(size, int):
        return size
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def resize_bytes(images: Tensor, size: tuple[int, int], filter: str) -> Tensor:
    """Resize as ``PIL.Image.resize`` does: rows first (from Pillow 13 on not in tall images).

    Args:
        images: ``[..., H, W]`` uint8.
        size: (height, width).
        filter: ``bicubic`` or ``bilinear``.

    Returns:
        ``[..., *size]`` uint8.
    """
    if images.shape[-1] != size[1]:
        # whole rows are faster to gather than single pixels
        images = _resize_rows(images.mT.contiguous(), size[1], filter).mT.contiguous()
    if images.shape[-2] != size[0]:
        images = _resize_rows(images, size[0], filter)
    return images


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The central ``size`` = (height, width) of ``[..., H, W]``; smaller images get black edges."""
    height, width = images.shape[-2:]
    down, right = max(size[0] - height, 0), max(size[1] - width, 0)
    if down or right:
        top, left = math.ceil(down / 2), math.ceil(right / 2)
        images = F.pad(images, (left, right - left, top, down - top))
        height, width = images.shape[-2:]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return images[..., top : top + size[0], left : left + size[1]]


def _size(value: Any) -> int | tuple[int, int]:
    if isinstance(value, int):
        return value
    if isinstance(value, Mapping):
        if set(value) == {"shortest_edge"}:
            return int(value["shortest_edge"])
        if set(value) == {"height", "width"}:
            return int(value["height"]), int(value["width"])
    raise ValueError(f"size: expected a number, shortest_edge or height and width, got {value!r}")


def _resize_rows(images: Tensor, length: int, filter: str) -> Tensor:
    """``[..., n, W]`` uint8 -> ``[..., length, W]`` uint8: each row is a weighted sum of rows."""
    places, weights = (x.to(images.device) for x in _taps(images.shape[-2], length, filter))
    images = images.int()
    shape = (*images.shape[:-2], length, images.shape[-1])
    half = 2 ** (_PRECISION_BITS - 1)  # Pillow's way back from fixed point: halves go up
    total = torch.full(shape, half, dtype=torch.int32, device=images.device)
    for place, weight in zip(places, weights, strict=True):
        total += images.index_select(-2, place).mul_(weight[:, None])
    return (total >> _PRECISION_BITS).clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def _taps(length: int, new_length: int, filter: str) -> tuple[Tensor, Tensor]:
    """Source places and Pillow's integer weights, both ``[taps, new_length]`` int32."""
    kernel, support = _KERNELS[filter]
    scale = length / new_length
    stretch = max(scale, 1.0)  # antialiasing: the kernel widens with the reduction
    rows = []
    for row in range(new_length):
        center = (row + 0.5) * scale
        first = max(int(center - support * stretch + 0.5), 0)
        last = min(int(center + support * stretch + 0.5), length)
        taps = [kernel((x - center + 0.5) / stretch) for x in range(first, last)]
        total = sum(taps)
        rows.append((first, [_round_away(tap / total * 2**_PRECISION_BITS) for tap in taps]))
    count = max(len(taps) for _, taps in rows)
    # shorter rows are filled up with weights of 0
    weights = [taps + [0] * (count - len(taps)) for _, taps in rows]
    places = [[min(first + k, length - 1) for k in range(count)] for first, _ in rows]
    return (
        torch.tensor(places, dtype=torch.int32).T.contiguous(),
        torch.tensor(weights, dtype=torch.int32).T.contiguous(),
    )


def _round_away(value: float) -> int:
    return int(value - 0.5) if value < 0 else int(value + 0.5)


def _bilinear(x: float) -> float:
    return max(1.0 - abs(x), 0.0)


def _bicubic(x: float, a: float = -0.5) -> float:
    """Keys' cubic convolution kernel (1981) with Pillow's a = -1/2."""
    x = abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return 0.0


_KERNELS: dict[str, tuple[Callable[[float], float], float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
}
