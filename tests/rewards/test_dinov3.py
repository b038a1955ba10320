"""DINOv3 features against transformers, in any batch and in half precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DINOv3ViTModel

import gardo_kernels as gk
from gardo.rewards.registry import build_features, feature_names
from gardo.types import UserError
from tests.rewards import tiny_models as tm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tm.dinov3_folder(tmp_path_factory.mktemp("dinov3"))


def pixels(batch: Tensor, side: int = tm.SIDE) -> Tensor:
    """The processor's steps (its own class needs torchvision); the resize is tested on its own."""
    resized = F.interpolate(batch, (side, side), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (resized - mean[:, None, None]) / std[:, None, None]


def test_features_are_transformers_pooled_output(folder: Path) -> None:
    model = DINOv3ViTModel.from_pretrained(folder).eval()
    features = build_features("dinov3", path=str(folder))
    assert "dinov3" in feature_names()
    assert (features.name, features.dimension) == ("dinov3", 48)
    with torch.no_grad():
        output = model(pixel_values=pixels(tm.images()))
    got = features(tm.images())
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got, output.pooler_output, rtol=0, atol=1e-5)
    mean = build_features("dinov3", path=str(folder), pooling="mean")
    expected = output.last_hidden_state[:, 5:].mean(1)  # class token and four registers come first
    torch.testing.assert_close(mean(tm.images()), expected, rtol=0, atol=1e-5)
    assert mean.model is features.model  # type: ignore[attr-defined]


def test_another_resolution(folder: Path) -> None:
    model = DINOv3ViTModel.from_pretrained(folder).eval()
    features = build_features("dinov3", path=str(folder), size=40)
    with torch.no_grad():
        expected = model(pixel_values=pixels(tm.images(), 40)).pooler_output
    torch.testing.assert_close(features(tm.images()), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="size: expected a multiple of the patch side 8, got 33"):
        build_features("dinov3", path=str(folder), size=33)
    with pytest.raises(UserError, match="pooling: expected cls or mean, got 'max'"):
        build_features("dinov3", path=str(folder), pooling="max")
    with pytest.raises(UserError, match="batch_size: expected at least 1"):
        build_features("dinov3", path=str(folder), batch_size=0)


def test_any_batch(folder: Path) -> None:
    together = build_features("dinov3", path=str(folder))(tm.images())
    for size in (1, 2, 3):
        parts = build_features("dinov3", path=str(folder), batch_size=size)(tm.images())
        torch.testing.assert_close(parts, together, rtol=0, atol=1e-5)
    features = build_features("dinov3", path=str(folder))
    assert features(tm.images()[:0]).shape == (0, 48)
    broken = tm.images()
    broken[3, 0, 0, 0] = torch.nan
    got = features(broken)
    assert got.isnan().any(dim=1).tolist() == [False, False, False, True, False]
    torch.testing.assert_close(got[:3], together[:3], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="images: expected shape"):
        features(tm.images()[0])


def test_distances_agree_in_half_precision(folder: Path) -> None:
    """The issue's bound: nearest-neighbour distances of fp32 and bf16 agree to 1e-2."""
    batch = tm.images(32)
    groups = torch.arange(32) // 8
    full, half = (
        gk.nearest_neighbor_distance(
            build_features("dinov3", path=str(folder), dtype=dtype)(batch), groups
        )
        for dtype in ("fp32", "bf16")
    )
    assert full.max() > 0.05  # larger than the bound, or the comparison would say nothing
    torch.testing.assert_close(half, full, rtol=0, atol=1e-2)
    assert not torch.equal(half, full)


def test_another_model_is_refused(tmp_path: Path) -> None:
    clip = tm.clip_folder(tmp_path / "clip")
    with pytest.raises(UserError, match="expected a checkpoint of type 'dinov3_vit', got 'clip'"):
        build_features("dinov3", path=str(clip))
