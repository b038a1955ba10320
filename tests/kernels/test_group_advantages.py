"""Group advantages against the literal form of the formulas, and their arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fused_inputs import REWARD_BACKENDS

import gardo_kernels as gk


def literal(proxy, ids, distance, norm, scale):
    """Sample by sample, for finite inputs."""
    out = np.zeros(len(proxy))
    for i in range(len(proxy)):
        same = ids == ids[i]
        out[i] = proxy[i] - proxy[same].mean()
        if norm == "group_std":
            out[i] /= proxy[same].std() + 1e-4
        elif norm == "global_std":
            out[i] /= proxy.std() + 1e-4
        if distance is not None and out[i] >= 0:
            mean = distance[same].mean()
            if scale == "raw":
                out[i] *= distance[i]
            elif mean > 0:
                out[i] *= distance[i] / mean
    return out


@pytest.mark.parametrize("backend", REWARD_BACKENDS)
@pytest.mark.parametrize("norm", ["none", "group_std", "global_std"])
@pytest.mark.parametrize("scale", ["group_mean", "raw"])
@pytest.mark.parametrize("with_distance", [False, True])
def test_against_the_literal_form(backend, norm, scale, with_distance):
    rng = np.random.default_rng(1)
    proxy, ids = rng.normal(size=60), rng.permutation(np.arange(60) % 7) * 1000 - 3
    distance = rng.uniform(0, 1, 60) if with_distance else None
    if with_distance:
        distance[ids == ids[0]] = 0.0  # identical images
    actual = gk.group_advantages(
        torch.tensor(proxy),
        torch.tensor(ids),
        None if distance is None else torch.tensor(distance),
        norm,
        diversity_scale=scale,
        backend=backend,
    )
    expected = literal(proxy, ids, distance, norm, scale)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", REWARD_BACKENDS)
@pytest.mark.parametrize("norm", ["none", "group_std", "global_std"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["proxy", "distance"])
def test_a_missing_reward_does_not_poison_its_group(backend, norm, bad, where):
    g = torch.Generator().manual_seed(0)
    proxy, distance = torch.randn(12, generator=g).double(), torch.rand(12, generator=g).double()
    ids = torch.arange(12) % 3
    keep = torch.arange(12) != 4
    alone = gk.group_advantages(proxy[keep], ids[keep], distance[keep], norm, backend=backend)
    {"proxy": proxy, "distance": distance}[where][4] = bad
    actual = gk.group_advantages(proxy, ids, distance, norm, backend=backend)
    assert actual[4] == 0
    torch.testing.assert_close(actual[keep], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", REWARD_BACKENDS)
def test_dtypes_and_empty(backend):
    proxy, ids = torch.tensor([1.0, 3.0]), torch.tensor([5, 5])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        actual = gk.group_advantages(proxy.to(dtype).requires_grad_(), ids, backend=backend)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not actual.requires_grad
        assert actual.tolist() == [-1.0, 1.0]
    assert gk.group_advantages(proxy[:0], ids[:0], proxy[:0], backend=backend).shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"proxy": torch.zeros(2, 2)}, ValueError, r"proxy: expected shape \[N\], got \[2, 2\]"),
        ({"proxy": torch.zeros(4).long()}, TypeError, "proxy: expected dtype"),
        ({"group_ids": torch.zeros(3).long()}, ValueError, "group_ids: expected shape"),
        ({"distance": torch.zeros(3)}, ValueError, "distance: expected shape"),
        ({"norm": "std"}, ValueError, "norm: expected one of none, group_std, global_std"),
        ({"diversity_scale": "mean"}, ValueError, "diversity_scale: expected one of group_mean"),
        ({"backend": "triton"}, ValueError, "backend: expected one of native, reference"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"proxy": torch.zeros(4), "group_ids": torch.zeros(4).long(), **change}
    with pytest.raises(error, match=message):
        gk.group_advantages(**arguments)
