"""The cap on the proxy against a literal form of the formula, and its invariances."""

from __future__ import annotations

import math

import pytest
import torch
from fused_inputs import REWARD_BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st

import gardo_kernels as gk

backends = pytest.mark.parametrize("backend", REWARD_BACKENDS)


def literal(proxy, aux, pool, tau):
    """Sample by sample, from lists of Python floats."""
    columns = [c for c in zip(*pool, strict=True) if all(map(math.isfinite, c))]
    rows = [list(row) for row in zip(*columns, strict=True)]
    out = []
    for i, own in enumerate(proxy):
        supports = [row[i] for row in aux]
        if not rows or not all(map(math.isfinite, [own, *supports])):
            out.append(math.nan)
            continue
        shares = [
            sum(1.0 if y < x else 0.5 if y == x else 0.0 for y in row) / len(row)
            for x, row in zip(supports, rows[1:], strict=True)
        ]
        level = sum(shares) / len(shares) + tau
        if level >= 1:
            out.append(own)
            continue
        ordered = sorted(rows[0])
        position = max(level, 0.0) * (len(ordered) - 1)
        lower = int(position)
        upper = min(lower + 1, len(ordered) - 1)
        weight = position - lower
        out.append(min(own, ordered[lower] * (1 - weight) + ordered[upper] * weight))
    return out


def rewards(seed, n=40, k=2, size=30, levels=None, missing=0.0):
    """Proxy, auxiliary rewards and pool; of few levels, so that there are ties, or of any."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        drawn = torch.randn(*shape, generator=g, dtype=torch.float64)
        if levels is not None:
            drawn = torch.randint(levels, shape, generator=g).double() / 4 - 1
        lost = torch.rand(shape, generator=g) < missing
        bad = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
        return torch.where(lost, bad[torch.randint(3, shape, generator=g)], drawn)

    return draw(n), draw(k, n), draw(1 + k, size)


@backends
@pytest.mark.parametrize("levels", [None, 8])
@pytest.mark.parametrize("missing", [0.0, 0.05])
def test_against_the_literal_form(backend, levels, missing):
    shapes = [(0, 1, 5), (1, 1, 1), (40, 2, 30), (17, 3, 2), (1500, 1, 64), (5, 40, 7)]
    for seed, (n, k, size) in enumerate(shapes):
        given_ = rewards(seed, n, k, size, levels, missing)
        for tau in (-0.3, 0.0, 0.15, 0.5, 1.0, -2.0, 2.0):
            got = gk.cap_rewards(*given_, tau, backend=backend)
            want = torch.tensor(literal(*(x.tolist() for x in given_), tau), dtype=torch.float64)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13, equal_nan=True)


@backends
def test_worked_out_by_hand(backend):
    pool = torch.tensor([[6.0, 1.0, 2.0, math.nan], [1.0, 3.0, 2.0, 9.0]])
    aux = torch.tensor([[0.0, 2.0, 4.0, 2.0, 2.0, math.inf]])
    proxy = torch.tensor([9.0, 9.0, 9.0, 0.5, math.nan, 9.0])
    got = gk.cap_rewards(proxy, aux, pool, 0.25, backend=backend)
    expected = torch.tensor([1.5, 4.0, 9.0, 0.5, math.nan, math.nan])
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@backends
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, 4),
    size=st.integers(1, 12),
    levels=st.sampled_from([None, 3, 9]),
    tau=st.floats(-1.2, 1.2),
    more=st.floats(0, 0.5),
    power=st.integers(-300, 300),
)
def test_properties(backend, seed, k, size, levels, tau, more, power):
    proxy, aux, pool = rewards(seed, 16, k, size, levels)

    def cap(proxy, aux, pool, tau=tau):
        return gk.cap_rewards(proxy, aux, pool, tau, backend=backend)

    capped = cap(proxy, aux, pool)
    assert (capped <= proxy).all()
    assert (capped >= torch.minimum(proxy, pool[0].min())).all()
    assert (cap(proxy, aux, pool, tau + more) >= capped).all()
    assert torch.equal(cap(proxy, aux, pool, 1.0), proxy)
    g = torch.Generator().manual_seed(seed)
    each = torch.stack([row[torch.randperm(size, generator=g)] for row in pool])
    assert torch.equal(cap(proxy, aux, each), capped)
    order = torch.randperm(16, generator=g)
    assert torch.equal(cap(proxy[order], aux[:, order], pool), capped[order])
    scale = torch.ones(1 + k, 1, dtype=torch.float64)
    scale[0] = 2.0**power
    assert torch.equal(cap(proxy * 2.0**power, aux, pool * scale), capped * 2.0**power)
    # only the order of the auxiliary rewards counts
    assert torch.equal(cap(proxy, aux * 4 + 1, torch.cat([pool[:1], pool[1:] * 4 + 1])), capped)


@backends
def test_rises_with_tau_without_a_fall_by_rounding(backend):
    _, _, pool = rewards(2, size=5)
    tau = torch.linspace(0, 1, 20_001).double()
    # a support below all of the pool: the level is tau
    proxy, aux = torch.full((1,), 1e3).double(), torch.full((1, 1), -1e3).double()
    caps = torch.cat([gk.cap_rewards(proxy, aux, pool[:2], t, backend=backend) for t in tau[::20]])
    assert (caps[1:] >= caps[:-1]).all()
    # 3 * tau is rounded to just below the highest sample
    near = math.nextafter(1.0, 0.0)
    own = pool[0].max()
    assert gk.cap_rewards(proxy, aux, pool[:2], near, backend=backend) <= own


@backends
def test_missing_rewards_leave_the_others_as_if_they_were_absent(backend):
    proxy, aux, pool = rewards(3)
    lost = torch.zeros(40, dtype=torch.bool)
    lost[[4, 17, 30]] = True
    alone = gk.cap_rewards(proxy[~lost], aux[:, ~lost], pool[:, 3:], 0.1, backend=backend)
    proxy[4], aux[0, 17], aux[1, 30] = math.inf, math.nan, -math.inf
    pool[0, 0], pool[1, 1], pool[2, 2] = math.nan, math.inf, -math.inf
    got = gk.cap_rewards(proxy, aux, pool, 0.1, backend=backend)
    assert got[lost].isnan().all()
    assert torch.equal(got[~lost], alone)
    nothing = gk.cap_rewards(proxy, aux, pool * math.nan, 2.0, backend=backend)
    assert nothing.isnan().all()


@backends
def test_tau_as_a_tensor(backend):
    given_ = rewards(4)
    for dtype in (torch.float64, torch.float32, torch.float16):
        got = gk.cap_rewards(*given_, torch.tensor(0.25, dtype=dtype), backend=backend)
        assert torch.equal(got, gk.cap_rewards(*given_, 0.25, backend=backend))
    for tau, expected in ((math.inf, given_[0]), (math.nan, given_[0] * math.nan)):
        got = gk.cap_rewards(*given_, torch.tensor(tau), backend=backend)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_inputs_that_are_not_contiguous(backend, dtype):
    proxy, aux, pool = (x.to(dtype) for x in rewards(5, 41, 3, 30))
    before = [x.clone() for x in (proxy, aux, pool)]
    got = gk.cap_rewards(proxy, aux, pool, 0.2, backend=backend)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = gk.cap_rewards(proxy.double(), aux.double(), pool.double(), 0.2, backend=backend)
    assert torch.equal(got, wide.to(got.dtype))
    scattered = gk.cap_rewards(
        proxy.repeat_interleave(2)[::2], aux.T.contiguous().T, pool.T.contiguous().T, 0.2,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(scattered, got)
    for x, kept in zip((proxy, aux, pool), before, strict=True):
        assert torch.equal(x, kept)
    if dtype == torch.float32:
        assert gk.cap_rewards(proxy, aux.half(), pool.double(), 0.2, backend=backend).shape == (41,)


@backends
def test_no_gradient_flows(backend):
    proxy, aux, pool = rewards(6)
    tau = torch.tensor(0.1, requires_grad=True)
    got = gk.cap_rewards(
        proxy.requires_grad_(), aux.requires_grad_(), pool.requires_grad_(), tau, backend=backend
    )
    assert not got.requires_grad


@backends
def test_it_is_an_operator(backend):
    proxy, aux, pool = rewards(7)
    pool[1, 3] = math.nan
    ordered = torch.where(pool.isfinite().all(0), pool, math.inf).sort().values
    op = torch.ops.gardo.cap_rewards.default
    for tau in (None, torch.tensor(0.1).double()):
        torch.library.opcheck(op, (backend, proxy, aux, ordered, 0.1, tau))

    def cap(proxy, aux, pool, tau):
        fixed = gk.cap_rewards(proxy, aux, pool, 0.1, backend=backend)
        return fixed, gk.cap_rewards(proxy, aux, pool, tau, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(cap, fullgraph=True, backend="aot_eager")
    operands = (proxy.float(), aux, pool, torch.tensor(0.3))
    for a, b in zip(compiled(*operands), cap(*operands), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"proxy": torch.zeros(2, 2)}, ValueError, r"proxy: expected shape \[N\], got \[2, 2\]"),
        ({"proxy": torch.zeros(4).long()}, TypeError, "proxy: expected dtype float32"),
        ({"proxy": [0.0] * 4}, TypeError, "proxy: expected a torch.Tensor, got list"),
        ({"aux": torch.zeros(2, 3)}, ValueError, r"aux: expected shape \[K, 4\], got \[2, 3\]"),
        ({"aux": torch.zeros(0, 4)}, ValueError, r"aux: expected at least one reward, .*\[0, 4\]"),
        (
            {"pool": torch.zeros(2, 5)},
            ValueError,
            r"pool: expected shape \[3, M\] .*, got \[2, 5\]",
        ),
        ({"pool": torch.zeros(3, 0)}, ValueError, r"pool: .* M at least 1, got \[3, 0\]"),
        ({"pool": torch.zeros(3)}, ValueError, r"pool: expected shape \[3, M\] .*, got \[3\]"),
        ({"pool": torch.zeros(3, 5).int()}, TypeError, "pool: expected dtype"),
        ({"pool": torch.zeros(3, 5, device="meta")}, ValueError, "pool: expected device cpu"),
        ({"tau": "0.1"}, TypeError, "tau: expected a number, got str"),
        ({"tau": math.nan}, ValueError, "tau: expected a finite number"),
        ({"tau": torch.zeros(1)}, ValueError, r"tau: expected shape \[\], got \[1\]"),
        ({"tau": torch.zeros((), device="meta")}, ValueError, "tau: expected device cpu"),
        ({"tau": torch.tensor(1)}, TypeError, "tau: expected dtype"),
        ({"backend": "triton"}, ValueError, "backend: expected one of native, reference"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "proxy": torch.zeros(4), "aux": torch.zeros(2, 4), "pool": torch.zeros(3, 5), "tau": 0.1,
        **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        gk.cap_rewards(**arguments)
