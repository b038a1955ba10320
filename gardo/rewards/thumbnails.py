"""Small copies of an epoch's images, by which a collapse is seen without a feature extractor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE = 16


@torch.no_grad()
def thumbnails(images: Tensor) -> Tensor:
    """Means over a 16 x 16 grid of areas, one row per image.

    Fine noise is averaged away, so that it does not count as a difference between images.

    Args:
        images: ``[B, C, H, W]`` floating point, on any device.

    Returns:
        ``[B, C * 256]`` float32 on the same device; nothing waits for it.
    """
    return F.adaptive_avg_pool2d(images.float(), _SIDE).flatten(1)


def image_variance(rows: Tensor, group_ids: Tensor) -> Tensor:
    """Variance of the images of a prompt group: mean over the thumbnail's values, then over groups.

    The variance has Bessel's correction. Rows that are not finite are left out, and so are groups
    with fewer than two others.

    Args:
        rows: ``[N, D]`` of `thumbnails`.
        group_ids: ``[N]`` integers, in any order.

    Returns:
        0-d float64; NaN without a group of two.
    """
    finite = rows.isfinite().all(1)
    values = rows[finite].double()
    groups, index = group_ids.to(rows.device)[finite].unique(return_inverse=True)
    # sums by matrix products: the same bits every time, unlike scattered additions on a GPU
    member = F.one_hot(index, max(len(groups), 1)).double()
    size = member.sum(0)
    mean = (member.T @ values) / size[:, None]
    squares = member.T @ (values - mean[index]).square().mean(1)
    several = size > 1
    return (squares[several] / (size[several] - 1)).mean()
