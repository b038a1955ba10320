"""Preprocessing on tensors against the reference processors, which work on Pillow images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gardo.rewards.preprocess import (
    ImageTransform,
    center_crop,
    resize_bytes,
    to_bytes,
    transform_from_config,
)

# Pillow 13 and later reduce tall images vertically first, which changes a byte here and there; the
# scorers' published numbers, and this project, go horizontally first. TALL is tested apart.
WIDE = [(224, 224), (512, 512), (64, 96), (300, 451), (37, 224), (1, 1)]
TALL = [(96, 64), (640, 231)]


def noise(height: int, width: int, count: int = 2) -> Tensor:
    """Noise beside smooth ramps, with saturated ends: bicubic overshoots must be clipped."""
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(5))
    images[1:] = torch.linspace(-0.2, 1.2, width).clamp(0, 1)
    return images


def pictures(images: Tensor) -> list[Image.Image]:
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


@pytest.mark.parametrize("size", WIDE)
def test_clip(size: tuple[int, int]) -> None:
    images = noise(*size)
    reference = CLIPImageProcessorPil()(pictures(images), return_tensors="pt")["pixel_values"]
    got = ImageTransform()(images)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, reference.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", WIDE)
def test_blip(size: tuple[int, int]) -> None:
    images = noise(*size)
    reference = BlipImageProcessorPil()(pictures(images), return_tensors="pt")["pixel_values"]
    got = ImageTransform(size=(384, 384), crop=None)(images)
    torch.testing.assert_close(got, reference.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", WIDE + TALL)
def test_resizing_bytes_is_pillows_to_the_bit(size: tuple[int, int], filter: str) -> None:
    images = noise(*size)
    resample = Image.Resampling[filter.upper()]
    for height, width in [(56, 56), (77, 130), (size[0], 91)]:
        expected = [
            np.asarray(p.resize((width, p.height), resample).resize((width, height), resample))
            for p in pictures(images)
        ]
        got = resize_bytes(to_bytes(images), (height, width), filter)
        assert torch.equal(got.permute(0, 2, 3, 1), torch.tensor(np.stack(expected)))


@pytest.mark.parametrize("size", [(512, 512), (96, 64), (300, 451)])
def test_dinov3_resizes_floats(size: tuple[int, int]) -> None:
    """DINOv3's processor resizes floats with antialiasing; Pillow does so in its mode F."""
    images = noise(*size)
    resized = [
        [
            np.asarray(
                Image.fromarray(channel.numpy()).resize((224, 224), Image.Resampling.BILINEAR)
            )
            for channel in image
        ]
        for image in images
    ]
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation
    mean, std = (torch.tensor(v)[:, None, None] for v in imagenet)
    expected = (torch.tensor(np.array(resized)) - mean) / std
    transform = ImageTransform((224, 224), None, "bilinear", *imagenet, as_bytes=False)
    torch.testing.assert_close(transform(images), expected, rtol=0, atol=1e-4)


def test_processor_files_old_and_new() -> None:
    new = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 30, "width": 28})
    assert transform_from_config(new.to_dict()) == ImageTransform(size=32, crop=(30, 28))
    old = {"size": 224, "crop_size": 224, "do_center_crop": True, "resample": 3}
    assert transform_from_config(old) == ImageTransform()
    blip = transform_from_config(BlipImageProcessorPil().to_dict())
    assert blip == ImageTransform(size=(384, 384), crop=None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_normalize": False}, "do_normalize: expected true"),
        ({"resample": 1}, r"resample: expected 2 \(bilinear\) or 3 \(bicubic\), got 1"),
        ({"size": {"longest_edge": 5}}, "size: expected a number"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor: expected 1/255"),
        ({"do_pad": True}, "do_pad"),
    ],
)
def test_unsupported_steps_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transform_from_config(config)


def test_crops_of_small_images_are_padded_as_by_the_reference() -> None:
    images = noise(21, 30)
    reference = CLIPImageProcessorPil(do_resize=False, do_normalize=False, do_rescale=False)
    for size in [(25, 26), (40, 41), (20, 33)]:
        expected = reference(
            pictures(images),
            crop_size={"height": size[0], "width": size[1]},
            return_tensors="pt",
        )["pixel_values"]
        assert torch.equal(center_crop(to_bytes(images), size), expected)
