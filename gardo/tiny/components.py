"""Connected components of a colour mask, in batched tensor code.

The count reward, the strict accuracy and the quality table all look at an image this way: which
pixels have the prompted colour, which of them hang together, and how large the pieces are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.tiny.scenes import BACKGROUND, COLORS

# Areas in pixels that a drawn shape may have: circles of radius 2.0-3.2 cover 12.6-32.2 px and the
# squares about as much; half of the smallest and one and a half of the largest bound "sensible".
SENSIBLE_AREA = (6, 48)


def color_mask(images: Tensor, colors: Tensor) -> Tensor:
    """Pixels for which the given colour is the nearest one.

    A pixel belongs to the mask when its colour is closer (Euclidean, RGB) to ``colors`` than to the
    background and at least as close as to every colour of the palette.

    Args:
        images: ``[B, 3, H, W]`` floating point in [0, 1].
        colors: ``[B, 3]``, the colour asked of each image.

    Returns:
        ``[B, H, W]`` bool.

    Raises:
        ValueError: a shape is not as above.
    """
    _check_images(images)
    if colors.shape != (images.shape[0], 3):
        raise ValueError(f"colors: expected shape [{images.shape[0]}, 3], got {list(colors.shape)}")
    colors = colors.to(images)
    target = (images - colors[:, :, None, None]).square().sum(dim=1)
    palette = images.new_tensor(list(COLORS.values()))
    others = (images[:, None] - palette[:, :, None, None]).square().sum(dim=2)  # [B, colours, H, W]
    background = (images - images.new_tensor(BACKGROUND)[:, None, None]).square().sum(dim=1)
    return (target < background) & (target <= others.amin(dim=1))


def label_components(mask: Tensor) -> Tensor:
    """Label the 8-connected components of each mask.

    Every pixel starts with its own number and takes the largest among its neighbours until nothing
    changes; following the label to the pixel of that number shortens long paths.

    Args:
        mask: ``[B, H, W]`` bool.

    Returns:
        ``[B, H, W]`` int64. 0 is background; a component carries one plus the row-major index of
        its last pixel, so labels are between 1 and ``H * W`` and not consecutive.

    Raises:
        TypeError: ``mask`` is not bool.
        ValueError: ``mask`` is not three-dimensional.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
    if mask.ndim != 3:
        raise ValueError(f"mask: expected shape [B, H, W], got {list(mask.shape)}")
    batch, height, width = mask.shape
    if mask.numel() == 0:
        return torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    number = torch.arange(1, height * width + 1, device=mask.device).view(height, width)
    labels = number * mask
    while True:
        # float32 holds these integers exactly, and max pooling is not available for integers
        # on every device
        spread = F.max_pool2d(labels.float(), kernel_size=3, stride=1, padding=1).long() * mask
        flat = F.pad(spread.flatten(1), (1, 0))  # column 0: the background points to itself
        jumped = flat.gather(1, spread.flatten(1)).view(batch, height, width)
        if torch.equal(jumped, labels):
            return labels
        labels = jumped


def component_areas(labels: Tensor) -> Tensor:
    """Area of every component.

    Args:
        labels: ``[B, H, W]`` int64 from :func:`label_components`.

    Returns:
        ``[B, H * W]`` int64, pixels of the component with label ``i + 1`` in column ``i``; 0 where
        no component has that label.
    """
    flat = labels.flatten(1)
    areas = flat.new_zeros(flat.shape[0], flat.shape[1] + 1)
    return areas.scatter_add_(1, flat, torch.ones_like(flat))[:, 1:]


def count_components(labels: Tensor, min_area: int = 1) -> Tensor:
    """Number of components with at least ``min_area`` pixels: ``[B, H, W]`` -> ``[B]`` int64."""
    return (component_areas(labels) >= max(min_area, 1)).sum(dim=1)


def exact_count(images: Tensor, counts: Tensor, colors: Tensor) -> Tensor:
    """Strict correctness of images of the embedded task.

    True when the components of the prompted colour are exactly ``counts``, each with an area within
    ``SENSIBLE_AREA`` (a stray pixel is a component too), and no pixel is nearest to another colour.

    Args:
        images: ``[B, 3, H, W]`` floating point in [0, 1].
        counts: ``[B]`` integers.
        colors: ``[B, 3]``.

    Returns:
        ``[B]`` bool.
    """
    mask = color_mask(images, colors)
    areas = component_areas(label_components(mask))
    low, high = SENSIBLE_AREA
    sensible = ((areas == 0) | ((areas >= low) & (areas <= high))).all(dim=1)
    background = (images - images.new_tensor(BACKGROUND)[:, None, None]).square().sum(dim=1)
    palette = images.new_tensor(list(COLORS.values()))
    nearest = (images[:, None] - palette[:, :, None, None]).square().sum(dim=2).amin(dim=1)
    stray = ((nearest < background) & ~mask).flatten(1).any(dim=1)
    return ((areas > 0).sum(dim=1) == counts.to(areas)) & sensible & ~stray


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected shape [B, 3, H, W], got {list(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected a floating point dtype, got {images.dtype}")
