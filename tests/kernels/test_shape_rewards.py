"""Advantages, uncertainty and gate against literal O(N^2) forms of the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gardo_kernels as gk
from gardo_kernels import core

NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(not core.is_available(), reason=str(core.unavailable_reason())),
)
BACKENDS = ["reference", NATIVE]


def win_rate_literal(r, ids):
    w = np.full(len(r), 0.5)
    for i in range(len(r)):
        others = [j for j in range(len(r)) if j != i and ids[j] == ids[i]]
        if others:
            w[i] = sum((r[j] < r[i]) + 0.5 * (r[j] == r[i]) for j in others) / len(others)
    return w


def expected(proxy, aux, ids, distance, fraction, norm, gate, scope):
    """All outputs for finite inputs, sample by sample."""
    n = len(proxy)
    advantage = np.zeros(n)
    for i in range(n):
        same = ids == ids[i]
        advantage[i] = proxy[i] - proxy[same].mean()
        if norm == "group_std":
            advantage[i] /= proxy[same].std() + 1e-4
        elif norm == "global_std":
            advantage[i] /= proxy.std() + 1e-4
        if distance is not None and advantage[i] >= 0 and distance[same].mean() > 0:
            advantage[i] *= distance[i] / distance[same].mean()
    where = ids if scope == "group" else np.zeros(n)
    if len(aux) == 0:
        u = np.zeros(n)
    elif gate == "official":

        def rank(r):
            better = (where[:, None] == where) & (r[None] > r[:, None])
            earlier = (where[:, None] == where) & (r[None] == r[:, None])
            earlier &= np.arange(n)[None] < np.arange(n)[:, None]
            return 1 + better.sum(1) + earlier.sum(1)

        u = rank(proxy) - np.mean([rank(a) for a in aux], axis=0)
    else:
        u = win_rate_literal(proxy, where) - np.mean(
            [win_rate_literal(a, where) for a in aux], axis=0
        )
    u = np.round(u, 12)  # the mean over K rounds; equal agreement is meant to be equal
    positive = u[u >= 0]
    threshold = np.quantile(positive, 1 - fraction)
    if gate == "all":
        mask = np.ones(n, bool)
    elif gate == "off":
        mask = np.zeros(n, bool)
    else:
        mask = u > threshold + 1e-9
    return advantage, u, mask, threshold, positive.mean()


def epoch(seed, n=40, k=2, groups=5, tied=False):
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 4, (k + 1, n)) if tied else rng.normal(size=(k + 1, n))
    proxy, aux = rewards[0].astype(float), rewards[1:].astype(float)
    ids = rng.permutation(np.arange(n) % groups) * 1000 - 7
    return proxy, aux, ids, rng.uniform(0.1, 1, n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", ["paper", "official", "all", "off"])
@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("norm", ["none", "group_std", "global_std"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_against_the_literal_form(backend, gate, scope, norm, tied, k):
    proxy, aux, ids, distance = epoch(k, k=k, tied=tied)
    for d in (None, distance):
        actual = gk.shape_rewards(
            torch.tensor(proxy),
            torch.tensor(aux).reshape(k, 40),
            torch.tensor(ids),
            None if d is None else torch.tensor(d),
            0.25,
            norm,
            gate,
            scope,
            backend,
        )
        wanted = expected(proxy, aux, ids, d, 0.25, norm, gate, scope)
        for name, value in zip(actual._fields, wanted, strict=True):
            np.testing.assert_allclose(
                getattr(actual, name).numpy(), value, rtol=1e-9, atol=1e-11, err_msg=name
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_hacked_sample_is_gated_by_paper_and_missed_by_official(backend):
    # Sample 4: best by the proxy, worst by both auxiliaries. Sample 0: the reverse.
    proxy = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    aux = torch.tensor([[4.0, 1, 2, 3, 0], [4.0, 1, 2, 3, 0]], dtype=torch.float64)
    ids = torch.zeros(5, dtype=torch.int64)
    paper = gk.shape_rewards(proxy, aux, ids, backend=backend)
    assert paper.uncertainty.tolist() == [-1.0, 0.0, 0.0, 0.0, 1.0]
    assert paper.gate.tolist() == [False, False, False, False, True]
    # Quantile 0.9 of (0, 0, 0, 1) by linear interpolation is 0.7.
    assert float(paper.threshold) == pytest.approx(0.7)
    assert float(paper.mean_uncertainty) == 0.25
    official = gk.shape_rewards(proxy, aux, ids, gate="official", backend=backend)
    assert official.uncertainty.tolist() == [4.0, 0.0, 0.0, 0.0, -4.0]
    assert official.gate.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_equal_rewards(backend):
    same = torch.full((6,), 0.3, dtype=torch.float64)
    shaped = gk.shape_rewards(
        same, same.expand(2, 6), torch.arange(6) // 3, torch.zeros(6).double(), backend=backend
    )
    torch.testing.assert_close(shaped.advantage, torch.zeros(6).double(), rtol=0, atol=1e-15)
    assert shaped.uncertainty.tolist() == [0.0] * 6
    assert not shaped.gate.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_agreement_is_exactly_zero_for_any_number_of_auxiliaries(backend):
    proxy = torch.arange(11, dtype=torch.float64)
    for k in (3, 7):
        shaped = gk.shape_rewards(
            proxy, proxy.expand(k, 11), torch.zeros(11, dtype=torch.int64), backend=backend
        )
        assert (shaped.uncertainty == 0).all()
        assert not shaped.gate.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_images_get_factor_one(backend):
    proxy = torch.tensor([1.0, 3.0, 1.0, 3.0], dtype=torch.float64)
    ids = torch.tensor([5, 5, 2, 2])
    distance = torch.tensor([0.0, 0.0, 0.2, 0.6], dtype=torch.float64)
    shaped = gk.shape_rewards(proxy, proxy.new_empty(0, 4), ids, distance, backend=backend)
    np.testing.assert_allclose(shaped.advantage.numpy(), [-1.0, 1.0, -1.0, 1.5], rtol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gate", ["paper", "official", "all"])
@pytest.mark.parametrize("where", ["proxy", "aux", "distance"])
def test_failed_rewards_leave_the_others_as_if_the_sample_were_absent(backend, bad, gate, where):
    proxy, aux, ids, distance = (torch.tensor(x) for x in epoch(3))
    broken = torch.tensor([4, 17, 30])
    kept = torch.ones(40, dtype=torch.bool)
    kept[broken] = False
    without = gk.shape_rewards(
        proxy[kept], aux[:, kept], ids[kept], distance[kept], gate=gate, backend=backend
    )
    target = {"proxy": proxy, "aux": aux[1], "distance": distance}[where]
    target[broken] = bad
    shaped = gk.shape_rewards(proxy, aux, ids, distance, gate=gate, backend=backend)
    assert shaped.advantage[broken].tolist() == [0.0] * 3
    assert shaped.uncertainty[broken].tolist() == [0.0] * 3
    assert not shaped.gate[broken].any()
    torch.testing.assert_close(shaped.advantage[kept], without.advantage, rtol=1e-12, atol=1e-14)
    assert torch.equal(shaped.uncertainty[kept], without.uncertainty)
    assert torch.equal(shaped.gate[kept], without.gate)
    assert torch.equal(shaped.threshold, without.threshold)
    torch.testing.assert_close(shaped.mean_uncertainty, without.mean_uncertainty)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("gate", ["paper", "official", "all", "off"])
def test_no_sample_and_one_sample(backend, n, gate):
    proxy = torch.full((n,), 2.0)
    shaped = gk.shape_rewards(
        proxy, proxy.expand(2, n), torch.zeros(n).long(), proxy, gate=gate, backend=backend
    )
    assert shaped.advantage.tolist() == [0.0] * n
    assert shaped.uncertainty.tolist() == [0.0] * n
    assert shaped.gate.tolist() == [gate == "all"] * n
    assert float(shaped.threshold) == 0
    assert float(shaped.mean_uncertainty) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_valid(backend):
    proxy = torch.full((4,), math.nan)
    shaped = gk.shape_rewards(proxy, proxy.expand(1, 4), torch.zeros(4).long(), backend=backend)
    assert shaped.advantage.tolist() == [0.0] * 4
    assert not shaped.gate.any()
    assert float(shaped.threshold) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_dtypes_and_layout(backend):
    proxy, aux, ids, distance = (torch.tensor(x) for x in epoch(1))
    wide = gk.shape_rewards(proxy.float(), aux.float(), ids, distance.float(), backend="reference")
    strided = gk.shape_rewards(
        torch.stack([proxy.float(), proxy.float()], 1)[:, 1],
        aux.float().T.contiguous().T,
        torch.stack([ids, ids], 1)[:, 0],
        distance.float(),
        fraction=torch.tensor(0.1, dtype=torch.float64),
        backend=backend,
    )
    assert strided.advantage.dtype == torch.float32
    for a, b in zip(wide, strided, strict=True):
        torch.testing.assert_close(a, b)


def test_threshold_uses_the_fraction_in_double_precision():
    # 21 non-negative values, fraction 0.1: the quantile is the 19th value exactly, and the gate
    # takes the two above it. A fraction rounded to float32 would let the 19th in.
    n = 41
    proxy = torch.arange(n, dtype=torch.float64)
    aux = proxy.flip(0)[None]
    for backend in ("reference", None):
        shaped = gk.shape_rewards(proxy, aux, torch.zeros(n).long(), backend=backend)
        assert int(shaped.gate.sum()) == 2


@pytest.mark.skipif(not core.is_available(), reason=str(core.unavailable_reason()))
def test_native_equals_reference_on_a_large_epoch():
    for tied in (False, True):
        proxy, aux, ids, distance = (torch.tensor(x) for x in epoch(9, 9216, 3, 384, tied))
        for gate in ("paper", "official"):
            for scope in ("batch", "group"):
                a, b = (
                    gk.shape_rewards(
                        proxy, aux, ids, distance, 0.1, "group_std", gate, scope, backend
                    )
                    for backend in ("native", "reference")
                )
                torch.testing.assert_close(a.advantage, b.advantage, rtol=1e-9, atol=1e-11)
                assert torch.equal(a.uncertainty, b.uncertainty)
                assert torch.equal(a.gate, b.gate)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_million_samples(backend):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(2, 10**6, generator=generator, dtype=torch.float64)
    ids = torch.randint(50_000, (10**6,), generator=generator)
    shaped = gk.shape_rewards(rewards[0], rewards[1:], ids, fraction=0.1, backend=backend)
    # Win rates of distinct values are their ranks.
    rank = rewards.argsort(-1).argsort(-1).double() / (10**6 - 1)
    torch.testing.assert_close(shaped.uncertainty, rank[0] - rank[1], rtol=0, atol=1e-12)
    assert int(shaped.gate.sum()) == pytest.approx(0.1 * 5 * 10**5, rel=0.01)
    sums = torch.zeros(50_000, dtype=torch.float64).index_add_(0, ids, shaped.advantage)
    assert float(sums.abs().max()) < 1e-10


reward = st.floats(-1e6, 1e6, width=32)
small = st.integers(0, 3).map(float)
sixty_fourths = st.integers(0, 64).map(lambda k: k / 64)  # exact in what follows


@st.composite
def epochs(draw):
    n = draw(st.integers(1, 24))
    k = draw(st.integers(0, 3))
    values = draw(st.sampled_from([reward, small]))
    rows = [draw(st.lists(values, min_size=n, max_size=n)) for _ in range(k + 1)]
    ids = draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n))
    order = draw(st.permutations(range(n)))
    table = torch.tensor(rows, dtype=torch.float64)
    return table[0], table[1:], torch.tensor(ids), torch.tensor(order)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(data=epochs(), fraction=sixty_fourths, scope=st.sampled_from(["batch", "group"]))
def test_properties(backend, data, fraction, scope):
    proxy, aux, ids, order = data
    arguments = {"fraction": fraction, "scope": scope, "backend": backend}
    shaped = gk.shape_rewards(proxy, aux, ids, **arguments)
    # Permutation equivariance.
    moved = gk.shape_rewards(proxy[order], aux[:, order], ids[order], **arguments)
    torch.testing.assert_close(moved.advantage, shaped.advantage[order], rtol=1e-9, atol=1e-6)
    assert torch.equal(moved.uncertainty, shaped.uncertainty[order])
    assert torch.equal(moved.gate, shaped.gate[order])
    # Advantages sum to zero in each group.
    for group in ids.unique():
        total = float(shaped.advantage[ids == group].sum())
        assert abs(total) <= 1e-9 * max(1.0, float(proxy.abs().max())) * len(ids)
    # The gate takes at most its share of the non-negative uncertainties.
    eligible = int((shaped.uncertainty >= 0).sum())
    assert eligible >= 1
    assert int(shaped.gate.sum()) <= math.ceil(fraction * (eligible - 1))
    assert (shaped.uncertainty[shaped.gate] > 0).all() or fraction == 1
    assert shaped.uncertainty.abs().max() <= 1


P = torch.zeros(4)
A, G = torch.zeros(2, 4), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"proxy": torch.zeros(2, 2)}, ValueError, r"proxy: expected shape \[N\], got \[2, 2\]"),
        ({"proxy": P.long()}, TypeError, "proxy: expected dtype"),
        ({"aux": torch.zeros(4)}, ValueError, r"aux: expected shape \[K, 4\], got \[4\]"),
        ({"aux": torch.zeros(2, 3)}, ValueError, r"aux: expected shape \[K, 4\]"),
        ({"aux": A.to("meta")}, ValueError, "aux: expected device cpu, got meta"),
        ({"group_ids": G.int()}, TypeError, "group_ids: expected dtype torch.int64"),
        ({"group_ids": G[:3]}, ValueError, "group_ids: expected shape"),
        ({"group_ids": [0, 0, 0, 0]}, TypeError, "group_ids: expected a torch.Tensor, got list"),
        ({"distance": torch.zeros(4, 1)}, ValueError, "distance: expected shape"),
        ({"fraction": 1.5}, ValueError, r"fraction: .*\[0.0, 1.0\], got 1.5"),
        ({"fraction": torch.tensor(-0.1)}, ValueError, "fraction"),
        ({"fraction": torch.zeros(2)}, ValueError, "fraction: expected one value"),
        ({"fraction": "0.1"}, TypeError, "fraction: expected a number, got str"),
        ({"advantage_norm": "std"}, ValueError, "advantage_norm: expected one of none"),
        ({"gate": "on"}, ValueError, "gate: expected one of paper"),
        ({"scope": "all"}, ValueError, "scope"),
        ({"backend": "triton"}, ValueError, "backend"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        gk.shape_rewards(**{"proxy": P, "aux": A, "group_ids": G, **change})
