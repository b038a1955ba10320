"""The JPEG rewards against files that are written independently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from gardo.rewards.registry import build_reward


@pytest.fixture
def images():
    noise = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 1, 56).expand(1, 3, 40, 56)
    return torch.cat([noise, ramp, torch.full_like(ramp, 0.5)])


def file_size(image, path):
    pixels = np.rint(image.double().numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(pixels).save(path, quality=95)
    return path.stat().st_size


def test_sizes_are_those_of_files(images, tmp_path):
    bytes_on_disk = [file_size(image, tmp_path / "x.jpg") for image in images]
    assert bytes_on_disk[0] > bytes_on_disk[1] > bytes_on_disk[2]
    large = build_reward("jpeg_incompressibility").score(images, [""] * 3, [{}] * 3).scores
    torch.testing.assert_close(large, torch.tensor(bytes_on_disk) / 1000, rtol=1e-6, atol=0)
    small = build_reward("jpeg_compressibility").score(images, [""] * 3, [{}] * 3).scores
    torch.testing.assert_close(small, -torch.tensor(bytes_on_disk) / 500_000, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["jpeg_compressibility", "jpeg_incompressibility"])
def test_the_contract(name, images):
    reward = build_reward(name)
    assert reward.spec.higher_is_better
    assert not reward.spec.needs_prompt
    scores = reward.score(images, [""] * 3, [{}] * 3).scores
    low, high = reward.spec.value_range
    assert scores.dtype == torch.float32
    assert low is None or scores.min() >= low
    assert high is None or scores.max() <= high
    alone = reward.score(images[1:2], [""], [{}]).scores
    assert torch.equal(alone, scores[1:2])
    broken = images.clone()
    broken[1, 0, 0, 0] = torch.nan
    assert reward.score(broken, [""] * 3, [{}] * 3).scores.isnan().tolist() == [False, True, False]
    assert reward.score(images[:0], [], []).scores.shape == (0,)
    with pytest.raises(ValueError, match="images: expected shape"):
        reward.score(images[0], [""], [{}])
