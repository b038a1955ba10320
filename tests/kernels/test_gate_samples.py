"""Uncertainty and gate against literal O(N^2) forms of the formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from fused_inputs import REWARD_BACKENDS

import gardo_kernels as gk

SIDES, TIES, SHARES, SCOPES = (
    ("over", "under"), ("half", "ordinal", "strict"), ("all", "nonnegative"), ("batch", "group")
)  # fmt: skip


def scores(rewards, where, side, ties):
    """Win rate, or ordinal rank, of each sample among those of its scope, pair by pair."""
    r = rewards if side == "over" else -rewards
    out = np.zeros(len(r))
    for i in range(len(r)):
        same = np.flatnonzero(where == where[i])
        if ties == "ordinal":
            out[i] = 1 + sum(r[j] < r[i] or (r[j] == r[i] and j < i) for j in same)
        elif ties == "strict":
            out[i] = np.mean(r[i] > r[same])
        else:
            rivals = same[same != i]
            points = sum((r[j] < r[i]) + 0.5 * (r[j] == r[i]) for j in rivals)
            out[i] = points / len(rivals) if len(rivals) else 0.5
    return out


def literal(proxy, aux, ids, fraction, side, ties, share_of, scope):
    where = ids if scope == "group" else np.zeros(len(proxy))
    u = np.zeros(len(proxy))
    if len(aux):
        rivals = [scores(a, where, side, ties) for a in aux]
        u = np.round(scores(proxy, where, side, ties) - np.mean(rivals, axis=0), 12)
    if share_of == "all" and scope == "group":
        threshold = np.array([np.quantile(u[ids == g], 1 - fraction) for g in ids])
        return u, u > threshold + 1e-9, threshold, u.mean()
    eligible = u if share_of == "all" else u[u >= 0]
    threshold = np.quantile(eligible, 1 - fraction)
    return u, u > threshold + 1e-9, threshold, eligible.mean()


def epoch(seed, n=60, k=2, groups=5, tied=False):
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 4, (k + 1, n)) if tied else rng.normal(size=(k + 1, n))
    ids = rng.permutation(np.arange(n) % groups) * 1000 - 7
    return rewards[0].astype(float), rewards[1:].astype(float), ids


@pytest.mark.parametrize("backend", REWARD_BACKENDS)
@pytest.mark.parametrize(
    ("side", "ties", "share_of", "scope"), list(itertools.product(SIDES, TIES, SHARES, SCOPES))
)
@pytest.mark.parametrize("tied", [False, True])
def test_against_the_literal_form(backend, side, ties, share_of, scope, tied):
    for k, fraction in itertools.product((0, 1, 3), (0.0, 0.1, 0.37, 1.0)):
        proxy, aux, ids = epoch(k, k=k, tied=tied)
        options = (fraction, side, ties, share_of, scope)
        actual = gk.gate_samples(
            torch.tensor(proxy), torch.tensor(aux).reshape(k, 60), torch.tensor(ids), *options,
            backend=backend,
        )  # fmt: skip
        expected = literal(proxy, aux, ids, *options)
        for name, value in zip(actual._fields, expected, strict=True):
            np.testing.assert_allclose(
                getattr(actual, name).numpy(), value, rtol=1e-9, atol=1e-11, err_msg=name
            )


@pytest.mark.parametrize("backend", REWARD_BACKENDS)
def test_the_papers_share_is_that_of_all_samples(backend):
    g = torch.Generator().manual_seed(0)
    proxy, aux = torch.randn(400, generator=g), torch.randn(2, 400, generator=g)
    ids = torch.arange(400) % 20
    out = gk.gate_samples(proxy, aux, ids, 0.1, backend=backend)
    assert int(out.gate.sum()) == 40
    assert out.threshold.shape == ()
    # Ranks cancel: what rounding would leave of the mean must not pass for a trend.
    assert float(out.mean_uncertainty) == 0
    assert abs(float(out.uncertainty.double().mean())) < 1e-8
    grouped = gk.gate_samples(proxy, aux, ids, 0.1, scope="group", backend=backend)
    assert grouped.threshold.shape == (400,)
    # Of 20 per prompt the quantile lies between the 18th and the 19th: two, fewer with ties.
    per_group = [int(grouped.gate[ids == i].sum()) for i in range(20)]
    assert max(per_group) == 2
    assert sum(per_group) > 30
    nonnegative = gk.gate_samples(proxy, aux, ids, 0.1, share_of="nonnegative", backend=backend)
    assert int(nonnegative.gate.sum()) < 25
    assert float(nonnegative.mean_uncertainty) > 0.1


@pytest.mark.parametrize("backend", REWARD_BACKENDS)
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("share_of", SHARES)
@pytest.mark.parametrize("scope", SCOPES)
def test_the_sides_mirror_each_other(backend, ties, share_of, scope):
    proxy, aux, ids = (torch.tensor(x) for x in epoch(4, tied=True))
    options = {"ties": ties, "share_of": share_of, "scope": scope, "backend": backend}
    under = gk.gate_samples(proxy, aux, ids, 0.2, side="under", **options)
    mirrored = gk.gate_samples(-proxy, -aux, ids, 0.2, side="over", **options)
    for a, b in zip(under, mirrored, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", REWARD_BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("share_of", SHARES)
@pytest.mark.parametrize("scope", SCOPES)
def test_missing_rewards_leave_the_others_as_if_they_were_absent(backend, bad, share_of, scope):
    proxy, aux, ids = (torch.tensor(x) for x in epoch(3))
    keep = torch.ones(60, dtype=torch.bool)
    keep[[4, 17, 30]] = False
    options = {"share_of": share_of, "scope": scope, "backend": backend}
    alone = gk.gate_samples(proxy[keep], aux[:, keep], ids[keep], 0.2, **options)
    proxy[4], aux[0, 17], aux[1, 30] = bad, bad, bad
    out = gk.gate_samples(proxy, aux, ids, 0.2, **options)
    assert not out.gate[~keep].any()
    assert (out.uncertainty[~keep] == 0).all()
    assert torch.equal(out.uncertainty[keep], alone.uncertainty)
    assert torch.equal(out.gate[keep], alone.gate)
    threshold = out.threshold if out.threshold.dim() == 0 else out.threshold[keep]
    assert torch.equal(threshold, alone.threshold)
    nothing = gk.gate_samples(proxy * bad, aux, ids, 0.2, **options)
    assert all(not value.any() for value in nothing)


@pytest.mark.parametrize("backend", REWARD_BACKENDS)
@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("scope", SCOPES)
def test_no_sample_and_one_sample(backend, n, scope):
    one = torch.ones(n)
    out = gk.gate_samples(one, one.expand(2, n), one.long(), 0.1, scope=scope, backend=backend)
    assert out.uncertainty.tolist() == [0.0] * n
    assert out.gate.tolist() == [False] * n
    assert out.threshold.shape == ((n,) if scope == "group" else ())


@pytest.mark.parametrize("backend", REWARD_BACKENDS)
def test_fraction_as_a_tensor_and_the_dtype_of_results(backend):
    proxy, aux, ids = (torch.tensor(x) for x in epoch(5))
    wide = gk.gate_samples(proxy, aux, ids, 0.1, backend=backend)
    as_tensor = gk.gate_samples(
        proxy, aux, ids, torch.tensor(0.1, dtype=proxy.dtype), backend=backend
    )
    for a, b in zip(wide, as_tensor, strict=True):
        assert torch.equal(a, b)
    single = gk.gate_samples(proxy.float(), aux.float(), ids, 0.1, backend=backend)
    assert [value.dtype for value in single] == [
        torch.float32, torch.bool, torch.float32, torch.float32
    ]  # fmt: skip
    assert torch.equal(single.gate, wide.gate)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"proxy": torch.zeros(2, 2)}, ValueError, r"proxy: expected shape \[N\], got \[2, 2\]"),
        ({"aux": torch.zeros(2, 3)}, ValueError, r"aux: expected shape \[K, 4\], got \[2, 3\]"),
        ({"aux": torch.zeros(2, 4, device="meta")}, ValueError, "aux: expected device cpu"),
        ({"group_ids": torch.zeros(4)}, TypeError, "group_ids: expected dtype torch.int64"),
        ({"fraction": 1.5}, ValueError, r"fraction: .*\[0.0, 1.0\], got 1.5"),
        ({"fraction": torch.zeros(2)}, ValueError, "fraction: expected one value"),
        ({"fraction": torch.zeros((), device="meta")}, ValueError, "fraction: expected device cpu"),
        ({"side": "both"}, ValueError, "side: expected one of over, under, got 'both'"),
        ({"ties": "max"}, ValueError, "ties: expected one of half, ordinal, strict"),
        ({"share_of": "paper"}, ValueError, "share_of: expected one of all, nonnegative"),
        ({"scope": "all"}, ValueError, "scope: expected one of batch, group"),
        ({"backend": "triton"}, ValueError, "backend: expected one of native, reference"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "proxy": torch.zeros(4), "aux": torch.zeros(2, 4), "group_ids": torch.zeros(4).long(),
        "fraction": 0.1, **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        gk.gate_samples(**arguments)


@pytest.mark.parametrize("backend", REWARD_BACKENDS)
@pytest.mark.parametrize("share_of", ["nonnegative", "all"])
def test_an_adaptive_fraction_moves_before_the_gate_is_drawn(backend, share_of):
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(200) % 10
    ours, theirs = gk.AdaptiveFraction(0.1), gk.AdaptiveFraction(0.1)
    moved = 0
    for spread in (1.0, 3.0, 0.2, 1.0):
        base = torch.randn(200, generator=g, dtype=torch.float64)
        proxy = base + spread * torch.randn(200, generator=g, dtype=torch.float64)
        aux = base.expand(2, -1).contiguous()
        proxy[7] = torch.nan
        found = gk.gate_samples(proxy, aux, ids, ours, share_of=share_of, backend=backend)
        u = found.uncertainty[proxy.isfinite()]
        before = theirs.fraction
        after = theirs.update(u[u >= 0].mean())
        moved += after != before
        expected = gk.gate_samples(proxy, aux, ids, after, share_of=share_of, backend=backend)
        assert torch.equal(found.gate, expected.gate)
        assert torch.equal(found.threshold, expected.threshold)
        torch.testing.assert_close(found.mean_uncertainty, u[u >= 0].mean(), rtol=1e-12, atol=0)
        assert ours.state_dict()["fraction"] == after
    assert moved >= 2


@pytest.mark.parametrize("backend", REWARD_BACKENDS)
@pytest.mark.parametrize("scope", SCOPES)
def test_strict_wins_are_the_papers_and_have_a_mean_where_rewards_are_equal(backend, scope):
    options = {"ties": "strict", "scope": scope, "backend": backend}
    ids = torch.zeros(4, dtype=torch.int64)
    aux = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    out = gk.gate_samples(torch.tensor([1.0, 1.0, 1.0, 2.0]), aux, ids, 0.5, **options)
    # of 4: the last one beats 3, the others none; by each auxiliary together 3 / 2
    assert out.uncertainty.tolist() == [-0.375, -0.375, -0.375, 0.375]
    assert float(out.mean_uncertainty) == -0.1875
    assert out.gate.tolist() == [False, False, False, True]
    # without equal rewards it is 0, without what rounding would leave
    proxy, aux, ids = (torch.tensor(x) for x in epoch(1, n=203, k=3, groups=7))
    proxy[5] = torch.nan
    out = gk.gate_samples(proxy, aux, ids, 0.1, **options)
    assert float(out.mean_uncertainty) == 0
    assert out.uncertainty.abs().max() > 0.5
    alone = gk.gate_samples(proxy[:1], aux[:, :1], ids[:1], 0.1, **options)
    assert float(alone.uncertainty) == 0


@pytest.mark.parametrize("backend", REWARD_BACKENDS)
@pytest.mark.parametrize("share_of", SHARES)
@pytest.mark.parametrize("ties", TIES)
def test_the_papers_rule_follows_the_mean_of_all_samples(backend, share_of, ties):
    fraction, means = gk.AdaptiveFraction(0.1, window=2, rule="paper"), []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        proxy = torch.tensor(rng.integers(0, 2 + 9 * (seed % 2), 60).astype(float))
        aux = torch.tensor(rng.integers(0, 3, (2, 60)).astype(float))
        ids = torch.arange(60) % 5
        rule = {"ties": ties, "share_of": share_of, "backend": backend}
        found = gk.gate_samples(proxy, aux, ids, fraction, **rule)
        means.append(float(found.mean_uncertainty))
        assert means[-1] == pytest.approx(float(found.uncertainty.mean()), abs=1e-12)
        assert (means[-1] == 0) == (ties != "strict")
        drawn = gk.gate_samples(proxy, aux, ids, fraction.fraction, **rule)
        assert torch.equal(found.gate, drawn.gate)
    assert fraction.state_dict()["history"] == means[-2:]
    assert (fraction.fraction == 0.1) == (ties != "strict")
