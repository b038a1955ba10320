"""The C++ `shape_rewards` against hand-computed cases and the float64 reference."""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import gardo_kernels as gk
from gardo_kernels import core

pytestmark = pytest.mark.skipif(
    not core.is_available(), reason=f"C++ core: {core.unavailable_reason()}"
)

# Both work in float64; they may add the members of a group in another order.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
shape_rewards = functools.partial(gk.shape_rewards, backend="native")
NORMS = ("none", "group_std", "global_std")
GATES = ("paper", "official", "all", "off")
SCOPES = ("batch", "group")


def case(
    samples: int, num_aux: int, groups: int, seed: int, *, levels: int = 0, missing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random rewards; `levels` > 0 rounds them to that many values, so that many are tied."""
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.randn(num_aux + 1, samples, generator=rng, dtype=torch.float64)
    if levels:
        rewards = (rewards * levels / 4).round()
    rewards[torch.rand(rewards.shape, generator=rng) < missing] = torch.nan
    # Ids are far apart, negative too, and in no order.
    ids = torch.randint(-groups, groups, (samples,), generator=rng) * (1 << 40)
    distance = torch.rand(samples, generator=rng, dtype=torch.float64)
    distance[ids == ids.max() if samples else slice(0, 0)] = 0.0  # one group of identical images
    return rewards[0].contiguous(), rewards[1:].contiguous(), ids, distance


def assert_equals_reference(
    proxy: Tensor,
    aux: Tensor,
    ids: Tensor,
    distance: Tensor | None,
    fraction: float,
    norm: str,
    gate: str,
    scope: str,
) -> None:
    arguments = (proxy, aux, ids, distance, fraction, norm, gate, scope)
    got = shape_rewards(*arguments)
    want = gk.shape_rewards(*arguments, backend="reference")
    for value, expected, name in zip(got, want, got._fields, strict=True):
        torch.testing.assert_close(
            value, expected, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("norm", "gate", "scope"), list(itertools.product(NORMS, GATES, SCOPES)))
@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_matches_the_reference(
    norm: str, gate: str, scope: str, levels: int, missing: float
) -> None:
    for seed, (samples, num_aux, groups) in enumerate([(96, 2, 4), (31, 1, 3), (257, 3, 20)]):
        proxy, aux, ids, distance = case(
            samples, num_aux, groups, seed, levels=levels, missing=missing
        )
        for fraction in (0.0, 0.1, 0.37, 1.0):
            for factor in (None, distance):
                assert_equals_reference(proxy, aux, ids, factor, fraction, norm, gate, scope)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("samples", "num_aux"), [(0, 0), (0, 2), (1, 0), (1, 2), (5, 0), (2, 1)])
def test_degenerate_sizes(samples: int, num_aux: int, gate: str, scope: str) -> None:
    proxy, aux, ids, distance = case(samples, num_aux, 2, seed=3)
    assert_equals_reference(proxy, aux, ids, distance, 0.1, "group_std", gate, scope)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("samples", "num_aux"), [(0, 2), (1, 0), (31, 0), (257, 3), (3000, 2)])
def test_float32_is_computed_in_float64(samples: int, num_aux: int, gate: str, scope: str) -> None:
    proxy, aux, ids, distance = case(samples, num_aux, 5, seed=4, missing=0.1)
    proxy, aux, distance = proxy.float(), aux.float(), distance.float()
    for factor in (None, distance):
        wide = None if factor is None else factor.double()
        options = (0.2, "group_std", gate, scope)
        got = shape_rewards(proxy, aux, ids, factor, *options)
        want = shape_rewards(proxy.double(), aux.double(), ids, wide, *options)
        for value, expected, name in zip(got, want, got._fields, strict=True):
            assert value.dtype == (torch.bool if name == "gate" else torch.float32)
            assert torch.equal(value, expected.to(value.dtype)), name


def test_all_missing_is_all_zero() -> None:
    proxy = torch.full((6,), torch.nan, dtype=torch.float64)
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    got = shape_rewards(proxy, torch.randn(2, 6).double(), ids)
    for value in got:
        assert not value.any()  # zeros, and False in the gate


def test_hand_computed() -> None:
    # Proxy wins of 4 samples: 0, 1.5, 1.5, 3 of 3. Auxiliary: 3, 1.5, 1.5, 0 of 3.
    proxy = torch.tensor([0.0, 1.0, 1.0, 5.0], dtype=torch.float64)
    aux = torch.tensor([[9.0, 2.0, 2.0, 1.0]], dtype=torch.float64)
    ids = torch.tensor([7, 7, -3, -3])
    distance = torch.tensor([0.5, 1.5, 0.1, 0.3], dtype=torch.float64)
    got = shape_rewards(proxy, aux, ids, distance, fraction=0.5)
    # Means 0.5 and 3; only positive advantages are multiplied, by 1.5 / 1.0 and 0.3 / 0.2.
    torch.testing.assert_close(got.advantage.tolist(), [-0.5, 0.75, -2.0, 3.0], **TOLERANCE)
    assert got.uncertainty.tolist() == [-1.0, 0.0, 0.0, 1.0]
    # Non-negative: 0, 0, 1; their median is 0, and only the last is strictly above.
    assert got.threshold.item() == 0.0
    assert got.gate.tolist() == [False, False, False, True]
    assert got.mean_uncertainty.item() == pytest.approx(1 / 3, abs=1e-15)


def test_a_missing_reward_leaves_the_others_as_if_it_were_not_there() -> None:
    proxy, aux, ids, distance = case(40, 2, 3, seed=5, levels=4)
    keep = torch.ones(40, dtype=torch.bool)
    keep[[3, 17, 30]] = False
    proxy[3], aux[0, 17], aux[1, 30] = torch.nan, torch.nan, torch.nan
    got = shape_rewards(proxy, aux, ids, distance, 0.2)
    alone = shape_rewards(proxy[keep], aux[:, keep].contiguous(), ids[keep], distance[keep], 0.2)
    for value, expected in zip(got[:3], alone[:3], strict=True):
        torch.testing.assert_close(value[keep], expected, **TOLERANCE)
        assert not value[~keep].any()
    assert got.threshold.item() == alone.threshold.item()


@pytest.mark.parametrize("scope", SCOPES)
def test_a_million_samples(scope: str) -> None:
    proxy, aux, ids, distance = case(1_000_000, 2, 20_000, seed=1, levels=1000, missing=1e-3)
    assert_equals_reference(proxy, aux, ids, distance, 0.1, "none", "paper", scope)


def test_concurrent_calls_agree() -> None:
    proxy, aux, ids, distance = case(20_000, 2, 800, seed=2)
    expected = shape_rewards(proxy, aux, ids, distance)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(shape_rewards, proxy, aux, ids, distance) for _ in range(8)]
        for call in calls:
            for value, want in zip(call.result(), expected, strict=True):
                assert torch.equal(value, want)


def test_the_core_names_what_it_refuses() -> None:
    proxy, aux, _, _ = case(8, 2, 2, seed=0)
    f64 = torch.float64
    with pytest.raises(TypeError, match="proxy: expected dtype torch.float64, got torch.bfloat16"):
        core.array("proxy", proxy.bfloat16(), f64, (8,))
    with pytest.raises(ValueError, match=r"aux: expected shape \[2, 8\], got \[2, 7\]"):
        core.array("aux", aux[:, :7].contiguous(), f64, (2, 8))
    with pytest.raises(ValueError, match="aux: expected a contiguous tensor"):
        core.array("aux", aux.t().contiguous().t(), f64, (2, 8))
    with pytest.raises(ValueError, match="proxy: expected a CPU tensor, got device meta"):
        core.array("proxy", proxy.to("meta"), f64, (8,))
    with pytest.raises(ValueError, match="scope: expected one of batch, group, got 'x'"):
        core.choice("scope", "x", SCOPES)
