"""The variance of a prompt's images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gardo.rewards.thumbnails import image_variance, thumbnails


def test_a_thumbnail_is_the_mean_of_areas():
    images = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    expected = images.reshape(2, 3, 16, 4, 16, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(thumbnails(images), expected, rtol=0, atol=1e-6)
    assert thumbnails(images[:0]).shape == (0, 768)
    assert thumbnails(images.half()).dtype == torch.float32


def test_variance_is_that_of_each_group_by_numpy():
    rows = np.random.default_rng(0).random((9, 5))
    groups = np.array([2, 0, 2, 1, 0, 2, 7, 0, 1])
    expected = np.mean([rows[groups == g].var(0, ddof=1).mean() for g in (0, 1, 2)])  # 7 is alone
    got = image_variance(torch.tensor(rows), torch.tensor(groups))
    assert float(got) == pytest.approx(expected, rel=1e-12)
    # a broken image leaves its group
    rows[0, 3] = np.nan
    groups_of_two = [rows[[2, 5]], rows[[1, 4, 7]], rows[[3, 8]]]
    expected = np.mean([g.var(0, ddof=1).mean() for g in groups_of_two])
    got = image_variance(torch.tensor(rows), torch.tensor(groups))
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_equal_images_have_none_and_nothing_to_compare_is_nan():
    same = torch.full((4, 6), 0.3)
    assert float(image_variance(same, torch.zeros(4, dtype=torch.int64))) == 0.0
    assert math.isnan(float(image_variance(same, torch.arange(4))))
    assert math.isnan(float(image_variance(same[:0], torch.arange(0))))
    assert math.isnan(float(image_variance(same * torch.nan, torch.zeros(4, dtype=torch.int64))))


def test_noise_alone_is_hardly_a_difference():
    draw = torch.Generator().manual_seed(0)
    noisy = 0.5 + 0.1 * torch.randn(4, 3, 256, 256, generator=draw)
    differing = torch.rand(4, 3, 1, 1, generator=draw).expand(4, 3, 256, 256)
    group = torch.zeros(4, dtype=torch.int64)
    noise, signal = (image_variance(thumbnails(x), group) for x in (noisy, differing))
    assert noise < 1e-4  # 0.01 over 256 pixels per area
    assert signal > 1e-2
