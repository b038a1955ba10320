"""GARDO's shaping beyond the published code: modes, scale, anchor, cap, supported diversity."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import gardo_kernels as gk
from gardo.algorithms.reward_shaper import RewardShaper, without_boost
from gardo.config import AlgorithmConfig
from gardo.types import UserError

NAN = math.nan
EVERYTHING = {
    "reward_scale": "auto",
    "cap": "on",
    "diversity": "supported",
    "gate": {"anchor": "base"},
}


def shaper(**keys) -> RewardShaper:
    return RewardShaper(AlgorithmConfig.model_validate({"diversity": False, **keys}))


def rewards(samples=240, groups=10, seed=0, agree=1.0):
    """A proxy, two judges that see it up to noise, and groups in turn."""
    source = torch.Generator().manual_seed(seed)
    proxy = torch.randn(samples, generator=source, dtype=torch.float64)
    noise = torch.randn(2, samples, generator=source, dtype=torch.float64)
    return proxy, agree * proxy + noise, torch.arange(samples) % groups


def strict_uncertainty(proxy, judges) -> torch.Tensor:
    """The paper's U of each sample, from counted wins."""
    wins = [[sum(a > b for b in row) for a in row] for row in (proxy.tolist(), *judges.tolist())]
    gaps = [len(judges) * w[0] - sum(w[1:]) for w in zip(*wins, strict=True)]
    return torch.tensor(gaps, dtype=torch.float64) / (len(judges) * len(gaps))


# --- the paper -----------------------------------------------------------------------------------


def test_the_paper_gates_a_tenth_of_all_by_strict_win_rates():
    proxy, judges, ids = rewards()
    proxy, judges = proxy.round(decimals=1), judges.round(decimals=0)  # with ties
    shaped = shaper(compat="paper").shape(proxy, judges, ids)
    uncertainty = strict_uncertainty(proxy, judges)
    threshold = uncertainty.quantile(0.9)
    assert torch.equal(shaped.gate, uncertainty > threshold)
    assert 0.08 <= shaped.metrics["gate/share"] <= 0.1
    assert shaped.metrics["uncertainty/mean"] == pytest.approx(float(uncertainty.mean()), abs=1e-6)


def test_the_other_reading_has_a_threshold_for_each_group():
    proxy, judges, ids = rewards(samples=240, groups=10)
    shaped = shaper(compat="paper", gate={"scope": "group"}).shape(proxy, judges, ids)
    for group in range(10):
        mine = ids == group
        uncertainty = strict_uncertainty(proxy[mine], judges[:, mine])
        over = uncertainty > uncertainty.quantile(0.9)
        assert torch.equal(shaped.gate[mine], over)
        assert 1 <= int(over.sum()) <= 3  # of 24, fewer where several tie at the threshold


def test_the_papers_fraction_waits_for_a_full_window_and_has_no_floor():
    """20 epochs of disagreement that falls: nothing moves; then a tenth less with each."""
    shape = shaper(compat="paper")
    fractions = []
    for epoch in range(60):
        # ever more samples tie by the proxy, which costs strict wins by the proxy alone
        judges = torch.arange(200.0, dtype=torch.float64)[None]
        shape.shape(judges[0].clamp(min=2 * epoch), judges, torch.arange(200) % 4)
        fractions.append(shape.fraction.fraction)
    assert fractions[:20] == [0.1] * 20
    for before, after in pairwise(fractions[20:]):
        assert after == pytest.approx(0.9 * before)
    assert fractions[-1] < 0.02


def test_the_papers_diversity_factor_is_the_distance_itself():
    proxy = torch.tensor([1.0, 0.0, 0.5, -0.5], dtype=torch.float64)
    judges, ids = proxy[None], torch.zeros(4, dtype=torch.int64)
    distance = torch.tensor([0.3, 0.1, 0.2, 0.4])
    shaped = shaper(compat="paper", diversity=True).shape(proxy, judges, ids, distance)
    expected = torch.tensor([0.75 * 0.3, -0.25, 0.25 * 0.2, -0.75])
    torch.testing.assert_close(shaped.advantage, expected)


# --- reward scale --------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.25, 2.0, 1024.0])
def test_a_power_of_two_on_the_proxy_changes_no_bit(factor):
    keys = {
        "reward_scale": "auto",
        "cap": "on",
        "diversity": "supported",
        "gate": {"anchor": "base"},
    }
    plain, scaled = shaper(**keys), shaper(**keys)
    for epoch in range(3):
        proxy, judges, ids = rewards(seed=epoch)
        distance = torch.rand(240, generator=torch.Generator().manual_seed(epoch))
        a = plain.shape(proxy, judges, ids, distance)
        b = scaled.shape(factor * proxy, judges, ids, distance)
        assert torch.equal(a.advantage, b.advantage)
        assert torch.equal(a.gate, b.gate)
        assert a.metrics.keys() == b.metrics.keys()
        unequal = {name for name in a.metrics if a.metrics[name] != b.metrics[name]}
        assert unequal == {"reward_scale"}


def test_the_scale_is_the_first_epochs_for_good():
    shape = shaper(reward_scale="auto")
    proxy, judges, ids = rewards(samples=8, groups=2)
    even, odd = proxy[::2], proxy[1::2]
    centred = torch.stack([even - even.mean(), odd - odd.mean()], 1).flatten()
    rms = centred.square().mean().sqrt()
    first = shape.shape(proxy, judges, ids)
    torch.testing.assert_close(first.advantage, (centred / rms).float())
    assert first.metrics["advantage/rms"] == pytest.approx(1.0)
    second = shape.shape(3 * proxy, judges, ids)
    torch.testing.assert_close(second.advantage, 3 * first.advantage)
    assert second.metrics["reward_scale"] == first.metrics["reward_scale"] == pytest.approx(rms)


def test_an_epoch_without_a_spread_sets_no_scale():
    shape = shaper(reward_scale="auto")
    proxy, judges, ids = rewards(samples=8, groups=2)
    flat = shape.shape(torch.ones(8, dtype=torch.float64), judges, ids)
    assert flat.metrics["reward_scale"] == flat.metrics["advantage/rms"] == 0.0
    assert not flat.advantage.any()
    assert shape.shape(proxy, judges, ids).metrics["advantage/rms"] == pytest.approx(1.0)


# --- anchor --------------------------------------------------------------------------------------


def hack(proxy, judges, share):
    """The proxy is fooled by the first samples, which the judges find worse."""
    count = int(share * len(proxy))
    fooled, worse = proxy.clone(), judges.clone()
    fooled[:count] += 5
    worse[:, :count] -= 2
    return fooled, worse, torch.arange(len(proxy)) < count


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_an_anchored_gate_sees_a_hack_that_most_samples_have(share):
    """Within the batch the fraction is all that can be gated, however many cheat."""
    proxy, judges, ids = rewards()
    anchored, batch = shaper(gate={"anchor": "base"}), shaper()
    for one in (anchored, batch):
        one.shape(proxy, judges, ids)
    fooled, worse, hacked = hack(*rewards(seed=1)[:2], share)
    seen = anchored.shape(fooled, worse, ids).gate
    assert seen[hacked].double().mean() > 0.9
    assert batch.shape(fooled, worse, ids).gate.double().mean() < 0.11


def test_the_anchored_fraction_is_one_of_the_base():
    proxy, judges, ids = rewards()
    keys = {"adaptive": False, "anchor": "base"}
    shape = shaper(gate={**keys, "fraction": 0.25})
    shape.shape(proxy, judges, ids)
    # the base's own samples, ranked against all of them and not against the others alone
    again = shape.shape(proxy, judges, ids)
    assert again.metrics["gate/share"] == pytest.approx(0.25, abs=0.01)
    pool = gk.Anchor(torch.cat([proxy[None], judges]))
    assert again.metrics["gate/threshold"] == float(pool.threshold(0.25))
    torch.testing.assert_close(again.uncertainty, pool.uncertainty(proxy, judges))


def test_the_first_epoch_needs_one_sample_with_all_scores():
    proxy, judges, ids = rewards(samples=8, groups=2)
    with pytest.raises(UserError, match="all its scores in the first epoch"):
        shaper(gate={"anchor": "base"}).shape(proxy.fill_(NAN), judges, ids)


# --- cap -----------------------------------------------------------------------------------------


def test_the_cap_takes_what_the_judges_do_not_support_and_leaves_gate_and_scale():
    proxy, judges, ids = rewards()
    capped, plain = shaper(cap="on", reward_scale="auto"), shaper(reward_scale="auto")
    for one in (capped, plain):
        one.shape(proxy, judges, ids)
    fooled, worse, hacked = hack(*rewards(seed=1)[:2], 0.3)
    a, b = capped.shape(fooled, worse, ids), plain.shape(fooled, worse, ids)
    assert torch.equal(a.gate, b.gate)
    assert a.metrics["reward_scale"] == b.metrics["reward_scale"]
    earned = capped.anchor.cap(fooled, worse, 80.0)
    assert torch.equal(earned < fooled, (earned != fooled))
    assert (earned < fooled)[hacked].double().mean() > 0.9
    assert (earned < fooled)[~hacked].double().mean() < 0.3
    expected = gk.group_advantages(earned, ids) / capped.scale
    torch.testing.assert_close(a.advantage, expected.float())
    assert a.metrics["cap/share"] == pytest.approx(float((earned < fooled).double().mean()))
    assert a.metrics["cap/tau"] == float(capped.anchor.threshold(0.2))


def test_the_lower_the_percentile_the_stronger_the_cap():
    shares = []
    for percentile in (20, 50, 80, 95, 100):
        shape = shaper(cap={"mode": "on", "percentile": percentile})
        shape.shape(*rewards())
        fooled, worse, _ = hack(*rewards(seed=1)[:2], 0.3)
        shares.append(shape.shape(fooled, worse, rewards()[2]).metrics["cap/share"])
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


def test_what_the_cap_does_to_correct_samples_is_told_where_a_rule_knows_them():
    proxy, judges, ids = rewards()
    shape = shaper(cap="on")
    correct = torch.tensor([1.0, 0.0, NAN] * 80)
    shaped = shape.shape(proxy, judges, ids, correct=correct)
    capped = shape.anchor.cap(proxy, judges, 80.0) < proxy
    expected = capped[::3].double().mean()
    assert shaped.metrics["cap/share_correct"] == pytest.approx(float(expected))
    assert "cap/share_correct" not in shape.shape(proxy, judges, ids).metrics


# --- diversity of supported samples --------------------------------------------------------------


def test_samples_without_support_get_at_most_their_groups_mean_distance():
    distance = torch.tensor([0.9, 0.1, 0.3, 0.8, 0.6, NAN], dtype=torch.float64)
    supported = torch.tensor([False, True, True, False, False, True])
    ids = torch.tensor([7, 7, 7, 2, 2, 2])
    found = without_boost(distance, supported, ids)
    # group 7: the mean of its supported ones; group 2 has none with a distance: the mean of all
    expected = torch.tensor([0.2, 0.1, 0.3, 0.7, 0.6, NAN], dtype=torch.float64)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_an_odd_and_hacked_sample_is_not_rewarded_for_being_odd():
    proxy, judges, ids = rewards()
    distance = torch.rand(240, generator=torch.Generator().manual_seed(3))
    fooled, worse, hacked = hack(*rewards(seed=1)[:2], 0.2)
    odd = torch.where(hacked, distance + 1, distance)
    sums = {}
    for diversity in (True, "supported", False):
        shape = shaper(diversity=diversity)
        shape.shape(proxy, judges, ids, distance)
        advantage = shape.shape(fooled, worse, ids, odd).advantage
        sums[diversity] = float(advantage[hacked].sum())
    assert sums[True] > 1.5 * sums[False]
    assert sums["supported"] == pytest.approx(sums[False], rel=0.1)


# --- all together --------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["gardo", "paper"])
def test_a_sample_that_lacks_a_value_takes_no_part(compat):
    """As if it had never been drawn, whatever else it has; in the first epoch and later."""
    keep = torch.arange(240) % 7 != 3
    shapes = [shaper(**EVERYTHING, compat=compat) for _ in range(2)]
    for epoch in range(3):
        proxy, judges, ids = rewards(seed=epoch)
        distance = torch.rand(240, generator=torch.Generator().manual_seed(epoch))
        holes = proxy.clone(), judges.clone(), distance.clone()
        lost = (~keep).nonzero().flatten().tolist()
        for number, row in enumerate(lost):
            (holes[0], holes[1][number % 2], holes[2])[number % 3][row] = (NAN, math.inf)[
                number % 2
            ]
        whole = shapes[0].shape(proxy[keep], judges[:, keep], ids[keep], distance[keep])
        holed = shapes[1].shape(holes[0], holes[1], ids, holes[2])
        assert not holed.advantage[~keep].any()
        assert not holed.gate[~keep].any()
        torch.testing.assert_close(holed.advantage[keep], whole.advantage, rtol=0, atol=1e-12)
        assert torch.equal(holed.gate[keep], whole.gate)
        shares = {"gate/share": 240 / int(keep.sum())}
        for name, value in whole.metrics.items():
            assert holed.metrics[name] * shares.get(name, 1) == pytest.approx(value), name


@pytest.mark.parametrize("compat", ["gardo", "paper"])
def test_the_state_goes_on_bitwise(compat):
    def run(shape, epochs):
        found = []
        for epoch in epochs:
            proxy, judges, ids = rewards(seed=epoch)
            distance = torch.rand(240, generator=torch.Generator().manual_seed(epoch))
            found.append(shape.shape(proxy, judges, ids, distance))
        return found

    whole = run(shaper(**EVERYTHING, compat=compat), range(30))
    first, second = (shaper(**EVERYTHING, compat=compat) for _ in range(2))
    assert first.anchor_state() == {}
    run(first, range(25))
    second.load_anchor(first.anchor_state(), torch.device("cpu"))
    second.load_state_dict(first.state_dict())
    for a, b in zip(whole[25:], run(second, range(25, 30)), strict=True):
        assert torch.equal(a.advantage, b.advantage)
        assert torch.equal(a.gate, b.gate)
        assert a.metrics == b.metrics


def test_the_state_of_an_earlier_version_loads():
    shape = shaper(reward_scale="auto")
    shape.load_state_dict({"fraction": 0.05, "history": [0.1, 0.2]})
    assert shape.fraction.fraction == 0.05
    assert shape.scale is None
