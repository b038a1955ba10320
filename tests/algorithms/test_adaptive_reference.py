"""When the reference is reset, and when the guard keeps it."""

import json

import pytest
import torch

from gardo.algorithms.adaptive_reference import AdaptiveReference, ResetGuard
from gardo.config import ReferenceConfig, load_config
from gardo.types import UserError

# --- without a guard -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "period", "kls", "resets"),
    [
        (1e-3, 0, [1e-4, 2e-3, 1e-4, 1e-3], [1]),  # strictly above
        (0.0, 3, [1.0] * 7, [2, 5]),
        (1e-3, 3, [1e-4, 2e-3, 1e-4, 1e-4, 1e-4], [1, 4]),  # a reset restarts the period
        (1e-3, 0, [None, None, 2e-3], [2]),  # no gated sample: no KL to judge by
        (0.0, 0, [1.0] * 5, []),
    ],
)
def test_resets(threshold, period, kls, resets):
    reference = AdaptiveReference(ReferenceConfig(kl_threshold=threshold, reset_every=period))
    assert [e for e, kl in enumerate(kls) if reference.update(kl)] == resets


def test_reset_counter_survives_a_state_round_trip():
    config = ReferenceConfig(kl_threshold=0.0, reset_every=3)
    first, second = AdaptiveReference(config), AdaptiveReference(config)
    first.update(0.0), first.update(0.0)
    second.load_state_dict(first.state_dict())
    assert second.update(0.0)


def test_optimizer_steps_are_counted_as_they_were_made():
    config = ReferenceConfig(kl_threshold=0.0, reset_every=0, reset_steps=3)
    reference, made = AdaptiveReference(config), [2, 2, 0, 2, 1, 1, 1, 1]
    assert [e for e, n in enumerate(made) if reference.update(0.0, steps=n)] == [1, 4, 7]
    reference.update(0.0, steps=2)
    other = AdaptiveReference(config)
    other.load_state_dict(json.loads(json.dumps(reference.state_dict())))
    assert other.update(0.0, steps=1)


def test_the_state_of_an_earlier_version_loads():
    reference = AdaptiveReference(ReferenceConfig(kl_threshold=0.0, reset_every=5, reset_steps=9))
    reference.load_state_dict({"epochs_since_reset": 3})
    assert (reference.epochs_since_reset, reference.steps_since_reset) == (3, 3)  # at least
    assert [reference.update(0.0, steps=1) for _ in range(2)] == [False, True]


# --- the guard -----------------------------------------------------------------------------------

ROW = torch.arange(10.0)
AGREE = torch.stack([ROW, ROW])  # proxy and auxiliary rank alike: all uncertainties are 0
BETTER = torch.stack([ROW, ROW + 100])
WORSE = torch.stack([ROW, ROW - 100])
# the proxy's best is the auxiliary's worst: its uncertainty is 1 - 0, the others' (i - (i + 1)) / 9
OVERRATED = torch.stack([ROW, torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 0])])


def guarded(**keys):
    keys = {"kl_threshold": 0.0, "reset_every": 2, "guard": True, "guard_window": 2, **keys}
    return ReferenceConfig(**{"guard_share": 0.1, **keys})


def decisions(config, epochs):
    reference = AdaptiveReference(config)
    out = []
    for scores in epochs:
        reset = reference.update(1.0, scores)
        out.append("reset" if reset else "refused" if reference.refused else "-")
    return out


def test_guard_lets_an_improving_policy_through():
    assert decisions(guarded(), [AGREE, BETTER, BETTER, BETTER]) == ["-", "reset", "-", "reset"]


def test_refused_reset_stays_due_until_the_window_is_clean_again():
    epochs = [AGREE, OVERRATED, OVERRATED, AGREE, AGREE, AGREE]
    assert decisions(guarded(), epochs) == ["-", "refused", "refused", "refused", "reset", "-"]
    unguarded = guarded(guard=False)
    assert decisions(unguarded, epochs) == ["-", "reset", "-", "reset", "-", "reset"]


def test_guard_refuses_what_the_auxiliaries_like_less():
    assert decisions(guarded(), [AGREE, WORSE, WORSE]) == ["-", "refused", "refused"]
    lax = guarded(guard_win_rate=0.0)
    assert decisions(lax, [AGREE, WORSE, WORSE, WORSE]) == ["-", "reset", "-", "reset"]


def test_guard_never_trusts_before_a_full_window():
    config = guarded(reset_every=1, guard_window=3)
    assert decisions(config, [AGREE] * 4) == ["refused", "refused", "reset", "reset"]


def test_tail_and_win_rate_by_hand():
    guard = ResetGuard(guarded(guard_window=1))
    guard.observe(AGREE)
    assert guard.growth() == 0
    assert guard.win_rate() == 0.5
    guard.observe(OVERRATED)
    assert guard.growth() == pytest.approx(1.0)  # one of ten samples is watched
    guard.observe(torch.stack([ROW, ROW + 5]))
    # 5..14 against 0..9: each of 5..9 beats k and ties one; each of 10..14 beats ten
    expected = (sum(range(5, 10)) + 5 * 0.5 + 5 * 10) / 100
    # a hundred quantiles of ten values are each value ten times
    assert guard.win_rate() == pytest.approx(expected, abs=1e-12)


def test_win_rate_of_many_samples_is_that_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(3, 700, generator=generator)
    after = torch.randn(3, 950, generator=generator) + 0.3
    guard = ResetGuard(guarded(guard_window=1))
    guard.observe(before)
    guard.observe(after)
    exact = (after[1:, :, None] > before[1:, None, :]).double().mean()
    assert guard.win_rate() == pytest.approx(float(exact), abs=0.005)


def test_losses_of_trust_do_not_add_up():
    def with_tail(swaps):
        """The proxy's best ranks ``swaps`` places lower by the auxiliary: U is swaps / 9."""
        aux = ROW.clone()
        aux[9] = 9 - swaps - 0.5
        return torch.stack([ROW, aux])

    # each is 1/9 above the one before; only the first is within 0.15 of the lowest
    epochs = [AGREE, with_tail(1), with_tail(2), with_tail(3)]
    config = guarded(guard_window=1, reset_every=1, guard_uncertainty=0.15, guard_win_rate=0.0)
    assert decisions(config, epochs) == ["reset", "reset", "refused", "refused"]


def test_missing_scores_are_left_out():
    hole = OVERRATED.clone()
    hole[1, 9] = torch.nan  # without its worst sample the rest agrees
    assert decisions(guarded(), [AGREE, hole, hole])[1] == "reset"
    nothing = torch.full((2, 10), torch.nan)
    epochs = [AGREE, nothing, nothing, AGREE]
    assert decisions(guarded(), epochs) == ["-", "refused", "refused", "reset"]


def test_guard_needs_auxiliary_rewards():
    with pytest.raises(ValueError, match="K > 0"):
        ResetGuard(guarded()).observe(ROW[None])
    with pytest.raises(ValueError, match="scores"):
        AdaptiveReference(guarded()).update(0.0)
    keys = {"algorithm.reference.guard": "true", "rewards.aux": "[]", "algorithm.gate.mode": "all"}
    with pytest.raises(UserError, match=r"reference\.guard: needs"):
        load_config("tiny", overrides=list(keys.items()))


def test_guard_decides_alike_after_a_state_round_trip_through_json():
    epochs = [AGREE, OVERRATED, BETTER, BETTER, OVERRATED, AGREE, BETTER, BETTER]
    expected = decisions(guarded(), epochs)
    assert {"reset", "refused"} <= set(expected)
    for cut in range(len(epochs)):
        first, second = AdaptiveReference(guarded()), AdaptiveReference(guarded())
        for scores in epochs[:cut]:
            first.update(1.0, scores)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = []
        for scores in epochs[cut:]:
            reset = second.update(1.0, scores)
            rest.append("reset" if reset else "refused" if second.refused else "-")
        assert rest == expected[cut:]


def test_state_of_a_guard_needs_a_guard():
    with pytest.raises(ValueError, match="guard"):
        AdaptiveReference(guarded(guard=False)).load_state_dict(
            AdaptiveReference(guarded()).state_dict()
        )
