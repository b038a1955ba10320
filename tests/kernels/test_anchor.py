"""The anchor: samples judged by a fixed pool of the base policy."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch

import gardo_kernels as gk


def pool_of(size=50, k=2, seed=0, levels=None):
    g = torch.Generator().manual_seed(seed)
    if levels is not None:
        return torch.randint(levels, (1 + k, size), generator=g).double()
    return torch.randn(1 + k, size, generator=g, dtype=torch.float64)


def share_beaten(pool, x):
    return sum(1.0 if y < x else 0.5 if y == x else 0.0 for y in pool) / len(pool)


@pytest.mark.parametrize("levels", [None, 5])
@pytest.mark.parametrize("k", [1, 3])
def test_uncertainty_is_that_of_the_definition(levels, k):
    anchor, pool = gk.Anchor(pool_of(40, k, 1, levels)), pool_of(40, k, 1, levels).tolist()
    samples = pool_of(30, k, 2, levels)
    got = anchor.uncertainty(samples[0], samples[1:])
    assert got.dtype == torch.float64
    for i, u in enumerate(got.tolist()):
        wins = [share_beaten(row, float(y)) for row, y in zip(pool, samples[:, i], strict=True)]
        assert u == pytest.approx(wins[0] - sum(wins[1:]) / k, abs=1e-12)


def test_agreement_is_exactly_none_and_missing_scores_are_nan():
    pool = pool_of(50, 1)
    anchor = gk.Anchor(torch.cat([pool[:1]] * 4))
    own = torch.randn(20, dtype=torch.float64)
    assert (anchor.uncertainty(own, own.expand(3, -1)) == 0).all()
    proxy, aux = torch.zeros(4), torch.zeros(3, 4)
    proxy[0], aux[1, 1], aux[2, 2] = math.nan, math.inf, -math.inf
    assert anchor.uncertainty(proxy, aux).isnan().tolist() == [True, True, True, False]
    assert anchor.uncertainty(proxy[:0], aux[:, :0]).shape == (0,)


@pytest.mark.parametrize("levels", [None, 4])
def test_the_pools_own_uncertainty_and_its_quantiles(levels):
    pool = pool_of(61, 2, 3, levels)
    anchor = gk.Anchor(pool)
    wins = gk.win_rate(pool)
    own = anchor.pool_uncertainty
    torch.testing.assert_close(own, wins[0] - (wins[1] + wins[2]) / 2, rtol=0, atol=1e-15)
    for share in (0, 0.05, 0.1, 0.37, 1):
        got = anchor.threshold(share)
        assert got.shape == ()
        assert float(got) == pytest.approx(np.quantile(own.numpy(), 1 - share), abs=1e-12)
        tensor = torch.tensor(share, dtype=torch.float64)
        assert torch.equal(anchor.threshold(tensor), got)
    assert anchor.threshold(torch.tensor(math.nan)).isnan()


def test_the_cap_takes_a_percentile_of_the_pools_uncertainty():
    pool, samples = pool_of(61, 2, 3), pool_of(40, 2, 4)
    anchor = gk.Anchor(pool)
    for percentile in (0, 50, 95.0, 100):
        tau = float(np.percentile(anchor.pool_uncertainty.numpy(), percentile))
        got = anchor.cap(samples[0], samples[1:], percentile)
        want = gk.cap_rewards(samples[0], samples[1:], pool, tau)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        tensor = torch.tensor(float(percentile), dtype=torch.float64)
        assert torch.equal(anchor.cap(samples[0], samples[1:], tensor), got)
    single = anchor.cap(samples[0].float(), samples[1:].float(), 50, backend="reference")
    assert single.dtype == torch.float32


def test_what_is_not_valid_is_dropped_from_the_pool():
    pool = pool_of(12)
    broken = torch.cat([pool, pool_of(3, 2, 9)], 1)
    broken[0, 12], broken[1, 13], broken[2, 14] = math.nan, math.inf, -math.inf
    assert torch.equal(gk.Anchor(broken).pool, pool)
    alone = gk.Anchor(pool[:, :1])
    assert alone.pool_uncertainty.tolist() == [0.0]
    assert float(alone.threshold(0.1)) == 0
    assert alone.cap(torch.tensor([1e9]), torch.zeros(2, 1), 95) <= pool[0, 0] + 1e-6


def test_a_checkpoint_restores_it_bitwise():
    pool, samples = pool_of(33, 2, 5, levels=7).float(), pool_of(40, 2, 6, levels=7)
    pool[1, 4] = math.nan
    anchor, file = gk.Anchor(pool), io.BytesIO()
    torch.save(anchor.state_dict(), file)
    file.seek(0)
    restored = gk.Anchor(torch.load(file, weights_only=True)["pool"])
    for a in (anchor, restored):
        assert set(a.state_dict()) == {"pool"}
    of = [
        (
            a.pool, a.pool_uncertainty, a.uncertainty(samples[0], samples[1:]),
            a.threshold(0.1), a.cap(samples[0], samples[1:], 95),
        )
        for a in (anchor, restored)
    ]  # fmt: skip
    for one, other in zip(*of, strict=True):
        assert torch.equal(one, other)


def test_what_is_given_stays_as_it_is_and_apart():
    pool = pool_of(10)
    kept = pool.clone()
    anchor = gk.Anchor(pool.requires_grad_())
    with torch.no_grad():
        pool.zero_()
    assert torch.equal(anchor.pool, kept)
    proxy = torch.zeros(3, requires_grad=True)
    assert not anchor.uncertainty(proxy, torch.zeros(2, 3)).requires_grad
    assert not anchor.cap(proxy, torch.zeros(2, 3), 95).requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: gk.Anchor([[0.0]]), TypeError, "pool: expected a torch.Tensor"),
        (lambda a: gk.Anchor(torch.zeros(3, 4).int()), TypeError, "pool: expected dtype"),
        (lambda a: gk.Anchor(torch.zeros(3)), ValueError, r"pool: expected shape \[1 \+ K, M\]"),
        (lambda a: gk.Anchor(torch.zeros(1, 4)), ValueError, r"K at least 1 .*, got \[1, 4\]"),
        (lambda a: gk.Anchor(torch.zeros(3, 0)), ValueError, "none among 0"),
        (lambda a: gk.Anchor(torch.full((3, 4), math.nan)), ValueError, "none among 4"),
        (lambda a: a.threshold(1.5), ValueError, r"share: .*\[0.0, 1.0\], got 1.5"),
        (lambda a: a.threshold(torch.zeros(2)), ValueError, r"share: expected shape \[\]"),
        (lambda a: a.cap(torch.zeros(2), torch.zeros(2, 2), 101), ValueError, "percentile"),
        (lambda a: a.cap(torch.zeros(2), torch.zeros(1, 2), 5), ValueError, r"aux: .*\[2, 2\]"),
        (lambda a: a.uncertainty(torch.zeros(2), torch.zeros(3, 2)), ValueError, "aux: expected"),
        (lambda a: a.uncertainty(torch.zeros(2, 1), torch.zeros(2, 2)), ValueError, "proxy"),
        (
            lambda a: a.uncertainty(torch.zeros(2, device="meta"), torch.zeros(2, 2)),
            ValueError,
            "proxy: expected device cpu, got meta",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(gk.Anchor(pool_of()))
