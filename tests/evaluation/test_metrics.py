"""Statistics of evaluations against NumPy in float64 and hand-computed cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gardo.evaluation.metrics import feature_distance, mean_pairwise_distance, summarize


def numpy_frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Textbook form: the trace of the square root from the eigenvalues of C1 C2 (not symmetric)."""
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values = np.linalg.eigvals(np.atleast_2d(c1) @ np.atleast_2d(c2))
    cross = np.sqrt(np.clip(values.real, 0, None)).sum()
    difference = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(difference + np.trace(np.atleast_2d(c1)) + np.trace(np.atleast_2d(c2)) - 2 * cross)


def test_feature_distance_against_numpy() -> None:
    rng = np.random.default_rng(0)
    for n, m, width in ((50, 70, 5), (200, 90, 16), (30, 30, 1)):
        x = rng.normal(size=(n, width)) @ rng.normal(size=(width, width))
        y = rng.normal(size=(m, width)) @ rng.normal(size=(width, width)) + 0.5
        got = feature_distance(torch.from_numpy(x), torch.from_numpy(y))
        assert got.dtype == torch.float64
        assert got.item() == pytest.approx(numpy_frechet(x, y), rel=1e-9)


def test_feature_distance_by_hand() -> None:
    # one dimension: (m1 - m2)^2 + (s1 - s2)^2; deviations sqrt(2) and 3 sqrt(2)
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[2.0], [8.0]])
    assert feature_distance(x, y).item() == pytest.approx(16 + 8, rel=1e-12)
    # independent axes: the sum over the axes
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    assert feature_distance(x, x * torch.tensor([3.0, 1.0])).item() == pytest.approx(
        16 / 3, rel=1e-12
    )


def test_feature_distance_of_fewer_samples_than_dimensions() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 64)), rng.normal(size=(9, 64))
    got = feature_distance(torch.from_numpy(x), torch.from_numpy(y)).item()
    # tr (C1^(1/2) C2 C1^(1/2))^(1/2) is the nuclear norm of the product of the centred samples
    a = (x - x.mean(0)) / math.sqrt(5)
    b = (y - y.mean(0)) / math.sqrt(8)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross
    assert got == pytest.approx(expected, rel=1e-6)


def test_feature_distance_is_zero_for_equal_sets_and_never_negative() -> None:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    scale = x.var().item() * 8
    assert 0 <= feature_distance(x, x).item() < 1e-9 * scale
    constant = torch.ones(5, 8)
    assert feature_distance(constant, constant).item() == 0
    assert feature_distance(x, x + 2).item() == pytest.approx(32, rel=1e-5)


def test_broken_rows_are_left_out() -> None:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    y = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    broken = torch.cat([x, torch.full((1, 4), torch.nan), torch.full((1, 4), torch.inf)])
    assert torch.equal(feature_distance(broken, y), feature_distance(x, y))
    assert feature_distance(x[:1], y).isnan()
    groups = torch.arange(22) % 2
    assert torch.equal(
        mean_pairwise_distance(broken, groups), mean_pairwise_distance(x, groups[:20])
    )


def test_mean_pairwise_distance_against_a_loop() -> None:
    x = torch.randn(31, 6, generator=torch.Generator().manual_seed(2))
    groups = torch.tensor([7, -3, 7, 100, 100] * 6 + [55])  # 55 has one member: left out
    means = []
    for group in (7, -3, 100):
        rows = x[groups == group].double().numpy()
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        pairs = [1 - unit[i] @ unit[j] for i in range(len(unit)) for j in range(i)]
        means.append(np.mean(pairs))
    got = mean_pairwise_distance(x, groups)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(100 * np.mean(means), rel=1e-10)


def test_mean_pairwise_distance_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    # cosines 0, -1, 0: distances 1, 2, 1
    assert mean_pairwise_distance(features, torch.zeros(3)).item() == pytest.approx(400 / 3)
    same = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    assert mean_pairwise_distance(same, torch.zeros(2)).item() == pytest.approx(0, abs=1e-10)
    zero = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert mean_pairwise_distance(zero, torch.zeros(2)).item() == 100
    assert mean_pairwise_distance(features, torch.arange(3)).isnan()
    assert mean_pairwise_distance(features[:0], torch.arange(0)).isnan()


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"features: expected shape \[N, D\], got \[3\]"):
        feature_distance(torch.rand(3), torch.rand(3, 2))
    with pytest.raises(ValueError, match="real_features: expected 2 columns"):
        feature_distance(torch.rand(3, 2), torch.rand(3, 4))
    with pytest.raises(ValueError, match=r"group_ids: expected shape \[3\], got \[2\]"):
        mean_pairwise_distance(torch.rand(3, 2), torch.zeros(2))


def test_summary() -> None:
    summary = summarize(torch.tensor([1.0, 2.0, torch.nan, 3.0, 6.0, torch.inf]))
    assert summary.count == 4
    assert summary.mean == pytest.approx(3)
    assert summary.std == pytest.approx(math.sqrt(14 / 3))  # squares 4 + 1 + 0 + 9
    assert summarize(torch.tensor([5.0])).std == 0
    empty = summarize(torch.tensor([torch.nan]))
    assert empty.count == 0
    assert math.isnan(empty.mean)
