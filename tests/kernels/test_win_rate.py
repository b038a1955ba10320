"""Win rates against the literal definition, and their invariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gardo_kernels as gk
from gardo_kernels import core

BACKENDS = [
    "reference",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(not core.is_available(), reason=str(core.unavailable_reason())),
    ),
]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


def test_hand_computed_with_ties(backend):
    rewards = torch.tensor([[1.0, 3.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    expected = [[1 / 6, 1.0, 1 / 6, 2 / 3], [0.5] * 4]
    torch.testing.assert_close(gk.win_rate(rewards, backend=backend), torch.tensor(expected))


def test_within_groups(backend):
    rewards = torch.tensor([[1.0, 9.0, 2.0, 8.0, 5.0]])
    ids = torch.tensor([7, -1, 7, -1, 3])
    assert gk.win_rate(rewards, ids, backend=backend).tolist() == [[0.0, 1.0, 1.0, 0.0, 0.5]]


def test_missing_rewards_are_no_rivals(backend):
    rewards = torch.tensor([[1.0, math.nan, 3.0, 2.0], [math.nan, 1.0, math.nan, math.nan]])
    rate = gk.win_rate(rewards, backend=backend)
    torch.testing.assert_close(
        rate,
        torch.tensor([[0.0, math.nan, 1.0, 0.5], [math.nan, 0.5, math.nan, math.nan]]),
        equal_nan=True,
    )


def test_infinities_are_ordinary_extremes(backend):
    rewards = torch.tensor([[-math.inf, 0.0, math.inf, math.inf]])
    torch.testing.assert_close(
        gk.win_rate(rewards, backend=backend), torch.tensor([[0, 1 / 3, 5 / 6, 5 / 6]])
    )


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0), (3, 1)])
def test_degenerate_shapes(backend, shape):
    rate = gk.win_rate(torch.ones(shape), torch.zeros(shape[1], dtype=torch.int64), backend=backend)
    assert rate.shape == shape
    assert (rate == 0.5).all()


def test_dtype():
    assert gk.win_rate(torch.zeros(1, 2).double()).dtype == torch.float64
    assert gk.win_rate(torch.zeros(1, 2).half()).dtype == torch.float32


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.integers(-5, 5), min_size=1, max_size=20),
    seed=st.integers(0, 2**31),
    shift=st.integers(-100, 100),
    scale=st.integers(1, 64),
)
def test_properties(backend, values, seed, shift, scale):
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.tensor([values, values[::-1]], dtype=torch.float64)
    ids = torch.randint(3, (n,), generator=generator)
    rate = gk.win_rate(rewards, ids, backend=backend)
    for row in range(2):
        for i in range(n):
            mine = rewards[row, i]
            others = [rewards[row, j] for j in range(n) if j != i and ids[j] == ids[i]]
            wins = sum(float(r < mine) + 0.5 * float(r == mine) for r in others)
            expected = wins / len(others) if others else 0.5
            assert float(rate[row, i]) == pytest.approx(expected, abs=1e-15)
    assert torch.equal(gk.win_rate(rewards * scale + shift, ids, backend=backend), rate)
    order = torch.randperm(n, generator=generator)
    assert torch.equal(gk.win_rate(rewards[:, order], ids[order], backend=backend), rate[:, order])
    torch.testing.assert_close(
        gk.win_rate(-rewards, ids, backend=backend), 1 - rate, rtol=0, atol=1e-15
    )


@pytest.mark.parametrize(
    ("rewards", "ids", "error", "message"),
    [
        (torch.zeros(3), None, ValueError, r"rewards: expected shape \[K, N\], got \[3\]"),
        (torch.zeros(1, 3).long(), None, TypeError, "rewards: expected dtype"),
        (torch.zeros(1, 3), torch.zeros(2).long(), ValueError, "group_ids: expected shape"),
        (torch.zeros(1, 3), torch.zeros(3), TypeError, "group_ids: expected dtype torch.int64"),
    ],
)
def test_errors_name_the_argument(rewards, ids, error, message):
    with pytest.raises(error, match=message):
        gk.win_rate(rewards, ids)
