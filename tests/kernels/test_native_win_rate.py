"""The C++ win rates against a direct count over all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gardo_kernels import core
from gardo_kernels.ops.win_rate import native

pytestmark = pytest.mark.skipif(
    not core.is_available(), reason=f"C++ core: {core.unavailable_reason()}"
)


def counted(rewards: Tensor, ids: Tensor | None) -> Tensor:
    """The definition, pair by pair."""
    samples = rewards.shape[1]
    rate = torch.full_like(rewards, torch.nan)
    for k, row in enumerate(rewards.tolist()):
        for i in range(samples):
            rivals = [
                j
                for j in range(samples)
                if j != i and row[j] == row[j] and (ids is None or ids[j] == ids[i])
            ]
            if row[i] != row[i]:
                continue
            points = sum(1.0 if row[j] < row[i] else 0.5 * (row[j] == row[i]) for j in rivals)
            rate[k, i] = points / len(rivals) if rivals else 0.5
    return rate


@pytest.mark.parametrize("samples", [0, 1, 2, 33])
@pytest.mark.parametrize("num_rewards", [0, 1, 3])
@pytest.mark.parametrize("grouped", [False, True], ids=["batch", "group"])
def test_matches_the_definition(samples: int, num_rewards: int, grouped: bool) -> None:
    rng = torch.Generator().manual_seed(samples)
    rewards = torch.randint(-3, 4, (num_rewards, samples), generator=rng).double()
    rewards[torch.rand(rewards.shape, generator=rng) < 0.1] = torch.nan
    rewards[rewards == 3] = torch.inf
    rewards[rewards == 2] = -0.0  # ties with 0
    ids = torch.randint(-2, 3, (samples,), generator=rng) if grouped else None
    got = native.win_rate(rewards, ids)
    torch.testing.assert_close(got, counted(rewards, ids), rtol=0, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("samples", [255, 256, 300, 5000])
def test_large_batches_agree_with_sorting(samples: int) -> None:
    # Both sides of the switch from comparing to counting sort, and several threads.
    rng = torch.Generator().manual_seed(samples)
    distinct = torch.randperm(samples, generator=rng).double() * 1e-300 - 1e-298
    got = native.win_rate(distinct[None], None)
    want = torch.argsort(torch.argsort(distinct)).double() / (samples - 1)
    torch.testing.assert_close(got[0], want, rtol=0, atol=1e-15)


@pytest.mark.parametrize("samples", [300, 5000, 70_000])
@pytest.mark.parametrize("spread", ["clustered", "ties", "wide"])
def test_sorting_by_the_highest_digits_first(samples: int, spread: str) -> None:
    # What differs in the lower digits alone, or hardly at all, is told apart afterwards.
    rng = torch.Generator().manual_seed(samples)
    steps = torch.randint(0, 2 * samples, (samples,), generator=rng).double()
    rewards = {
        "clustered": 1 + steps * 2.0**-52,
        "ties": steps % 7,
        "wide": (steps - samples) * 10 ** (steps % 500 - 250),
    }[spread]
    rewards[samples // 2] = -1e300
    ordered = rewards.sort().values
    lower = torch.searchsorted(ordered, rewards)
    not_higher = torch.searchsorted(ordered, rewards, right=True)
    want = (lower + 0.5 * (not_higher - lower - 1).double()) / (samples - 1)
    got = native.win_rate(rewards[None], None)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-15)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards: expected shape \[K, N\], got \[3\]"):
        native.win_rate(torch.zeros(3).double(), None)
    with pytest.raises(TypeError, match=r"rewards: expected dtype torch.float64"):
        native.win_rate(torch.zeros(1, 3), None)
