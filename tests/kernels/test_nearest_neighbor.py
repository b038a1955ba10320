"""Distances to the nearest neighbour against a literal numpy form."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch

import gardo_kernels as gk
from gardo_kernels.ops.nearest_neighbor import native

HAS_FAISS = importlib.util.find_spec("faiss") is not None
FAISS = pytest.param(
    "faiss", marks=pytest.mark.skipif(not HAS_FAISS, reason="faiss is not installed")
)
BACKENDS = ["reference", FAISS]


def expected(features, ids):
    f = features.double().numpy()
    out = np.zeros(len(f))
    for i in range(len(f)):
        best = None
        for j in range(len(f)):
            if j != i and ids[j] == ids[i]:
                cosine = f[i] @ f[j] / np.linalg.norm(f[i]) / np.linalg.norm(f[j])
                best = cosine if best is None else max(best, cosine)
        out[i] = 0 if best is None else np.clip(1 - best, 0, 2)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_mixed_group_sizes_in_any_order(rng, backend, dtype):
    sizes = [1, 2, 2, 5, 9, 1]
    ids = torch.cat([torch.full((n,), 100 - 30 * g) for g, n in enumerate(sizes)])
    ids = ids[torch.randperm(len(ids), generator=rng)]
    features = (torch.randn(len(ids), 17, generator=rng) * 8).to(dtype)
    actual = gk.nearest_neighbor_distance(features, ids, backend=backend)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 and backend == "reference" else 1e-6
    np.testing.assert_allclose(actual.numpy(), expected(features, ids), rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed(backend):
    features = torch.tensor([[2.0, 0], [0, 3], [-1, 0], [5, 5], [7, 1]])
    ids = torch.tensor([0, 0, 0, 0, 9])
    root = 1 / math.sqrt(2)
    distance = gk.nearest_neighbor_distance(features, ids, backend=backend)
    torch.testing.assert_close(distance, torch.tensor([1 - root, 1 - root, 1.0, 1 - root, 0.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_duplicates_have_distance_zero(backend, rng):
    features = torch.randn(1, 33, generator=rng).expand(4, 33) * torch.tensor(
        [[1.0], [2], [3], [9]]
    )
    distance = gk.nearest_neighbor_distance(features, torch.zeros(4).long(), backend=backend)
    assert (distance >= 0).all()
    torch.testing.assert_close(distance, torch.zeros(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_and_missing_features(backend):
    features = torch.tensor([[1.0, 0], [1, 0.1], [0, 0], [math.nan, 1]])
    distance = gk.nearest_neighbor_distance(features, torch.zeros(4).long(), backend=backend)
    assert distance[3].isnan()
    assert float(distance[2]) == 1
    torch.testing.assert_close(distance[:2], torch.full((2,), 1 - 1 / math.sqrt(1.01)))


def test_only_missing_neighbours_count_as_none():
    features = torch.tensor([[1.0, 0], [math.nan, 1]])
    assert float(gk.nearest_neighbor_distance(features, torch.zeros(2).long())[0]) == 0


def test_opposite_members():
    features = torch.tensor([[1.0, 0], [-1, 0]])
    assert gk.nearest_neighbor_distance(features, torch.zeros(2).long()).tolist() == [2.0, 2.0]


def test_large_groups_are_computed_in_blocks(rng, monkeypatch):
    from gardo_kernels.ops.nearest_neighbor import reference

    features = torch.randn(60, 5, generator=rng)
    ids = torch.tensor([0] * 37 + [1] * 8 + [2] * 8 + [3] * 7)
    monkeypatch.setattr(reference, "_MAX_BLOCK", 64)
    actual = gk.nearest_neighbor_distance(features, ids, backend="reference")
    np.testing.assert_allclose(actual.numpy(), expected(features, ids), rtol=0, atol=1e-6)


def test_empty():
    distance = gk.nearest_neighbor_distance(torch.empty(0, 4), torch.empty(0).long())
    assert distance.shape == (0,)


@pytest.mark.skipif(not HAS_FAISS, reason="faiss is not installed")
def test_faiss_takes_over_at_large_groups(rng, monkeypatch):
    from gardo_kernels.ops.nearest_neighbor import faiss

    called = []
    run = faiss.nearest_neighbor_distance
    monkeypatch.setattr(
        faiss, "nearest_neighbor_distance", lambda f, i: called.append(len(f)) or run(f, i)
    )
    features = torch.randn(1100, 4, generator=rng)
    for groups in (2, 1):
        ids = torch.arange(1100) % groups
        actual = gk.nearest_neighbor_distance(features, ids)
        expected = gk.nearest_neighbor_distance(features, ids, backend="reference")
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert called == [1100]


def test_the_core_refuses_groups_above_a_size(rng):
    ids = torch.randint(-5, 5, (3000,), generator=rng) * 2**40
    features = torch.randn(3000, 4, generator=rng)
    largest = int(ids.unique(return_counts=True)[1].max())
    assert native.distance_up_to(features, ids, largest - 1) is None
    distance = native.distance_up_to(features, ids, largest)
    assert torch.equal(distance, native.nearest_neighbor_distance(features, ids))
    assert native.distance_up_to(features[:0], ids[:0], 0).shape == (0,)


@pytest.mark.skipif(HAS_FAISS, reason="faiss is installed")
def test_missing_faiss_is_refused_by_name():
    with pytest.raises(gk.BackendUnavailable, match="faiss-cpu, or faiss-gpu"):
        gk.nearest_neighbor_distance(torch.ones(2, 2), torch.zeros(2).long(), backend="faiss")


@pytest.mark.parametrize(
    ("features", "ids", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), ValueError, r"features: expected shape \[N, D\]"),
        (torch.zeros(3, 0), torch.zeros(3).long(), ValueError, "features: expected D >= 1"),
        (torch.zeros(3, 2).int(), torch.zeros(3).long(), TypeError, "features: expected dtype"),
        (torch.zeros(3, 2), torch.zeros(2).long(), ValueError, "group_ids: expected shape"),
        (torch.zeros(3, 2), torch.zeros(3), TypeError, "group_ids: expected dtype"),
    ],
)
def test_errors_name_the_argument(features, ids, error, message):
    with pytest.raises(error, match=message):
        gk.nearest_neighbor_distance(features, ids)
