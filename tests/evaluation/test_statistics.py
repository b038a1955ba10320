"""Estimates against cases worked out by hand and an independent bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gardo.evaluation.statistics import (
    PromptBootstrap,
    Resampled,
    average,
    group_diversity,
    hacking_gap,
    wins,
)

NAN = math.nan


def test_wins_by_hand():
    scores = np.array([[1.0, 2.0, 3.0, NAN, 0.0]])
    base = np.array([[0.0, 2.0, 4.0, 1.0, NAN]])
    np.testing.assert_array_equal(wins(scores, base), [[1.0, 0.5, 0.0, NAN, NAN]])


def test_two_prompts_have_three_resamples():
    """Each of (0, 0), (0, 1), (1, 0), (1, 1) has probability 1/4: means 0, 0.5, 0.5, 1."""
    found = PromptBootstrap(2, resamples=20_000, seed=3).mean(np.array([[0.0, 0.0], [1.0, 1.0]]))
    assert found.value == 0.5
    values, counts = np.unique(found.replicates, return_counts=True)
    np.testing.assert_array_equal(values, [0.0, 0.5, 1.0])
    # four standard errors of a share of 20 000 draws are 0.014
    np.testing.assert_allclose(counts / 20_000, [0.25, 0.5, 0.25], atol=0.015)
    estimate = found.interval()
    assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_missing_images_weigh_nothing():
    found = PromptBootstrap(2, resamples=5000).mean(np.array([[1.0, NAN], [3.0, 5.0]]))
    assert found.value == pytest.approx((1 + 3 + 5) / 3)
    # both prompts once: 9 / 3; the first twice: 2 / 2; the second twice: 16 / 4
    assert set(found.replicates.tolist()) == {1.0, 3.0, 4.0}


def test_a_prompt_without_scores_and_none_at_all():
    found = PromptBootstrap(2, resamples=500).mean(np.array([[NAN, NAN], [2.0, 2.0]]))
    assert found.value == 2.0
    assert set(found.replicates[np.isfinite(found.replicates)].tolist()) == {2.0}
    assert not np.isfinite(found.replicates).all()  # the first prompt twice
    nothing = PromptBootstrap(2).mean(np.full((2, 3), NAN)).interval()
    assert math.isnan(nothing.value)
    assert math.isnan(nothing.low)


def test_one_prompt_has_no_interval():
    estimate = PromptBootstrap(1).mean(np.array([[1.0, 2.0]])).interval()
    assert estimate.value == 1.5
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


def test_against_an_independent_bootstrap():
    """Prompts drawn by index, one resample at a time, with another generator."""
    source = np.random.default_rng(0)
    scores = source.normal(size=(30, 1)) + 0.3 * source.normal(size=(30, 4))
    draw = np.random.RandomState(7)
    means = [scores[draw.randint(0, 30, size=30)].mean() for _ in range(20_000)]
    expected = np.quantile(means, [0.025, 0.975])
    estimate = PromptBootstrap(30, resamples=20_000).mean(scores).interval()
    # the ends of a 95% interval from 20 000 resamples have a standard error of about 0.02 sd
    tolerance = 0.1 * np.std(means)
    assert estimate.low == pytest.approx(expected[0], abs=tolerance)
    assert estimate.high == pytest.approx(expected[1], abs=tolerance)
    # a bootstrap over images would be too sure of itself
    flat = scores.ravel()
    naive = [flat[draw.randint(0, 120, size=120)].mean() for _ in range(5000)]
    width = np.quantile(naive, 0.975) - np.quantile(naive, 0.025)
    assert estimate.high - estimate.low > 1.7 * width


def test_coverage_is_about_what_it_says():
    """Of 300 samples of 40 prompts, 95% of the intervals hold the true mean, 0."""
    source = np.random.default_rng(5)
    bootstrap = PromptBootstrap(40, resamples=500)
    hits = 0
    for _ in range(300):
        scores = source.normal(size=(40, 1)) + 0.5 * source.normal(size=(40, 3))
        estimate = bootstrap.mean(scores).interval()
        hits += estimate.low <= 0 <= estimate.high
    # the standard error of the share is 0.013; percentile intervals fall a little short
    assert 0.90 <= hits / 300 <= 0.98


def test_equal_arguments_give_equal_draws():
    first, again, other = PromptBootstrap(9), PromptBootstrap(9), PromptBootstrap(9, seed=1)
    np.testing.assert_array_equal(first.counts, again.counts)
    assert not np.array_equal(first.counts, other.counts)
    assert (first.counts.sum(1) == 9).all()


def test_differences_are_taken_within_a_resample():
    """What two statistics share cancels: their difference is constant here."""
    bootstrap = PromptBootstrap(20)
    scores = np.random.default_rng(1).normal(size=(20, 2))
    gap = (bootstrap.mean(scores + 0.25) - bootstrap.mean(scores)).interval()
    assert gap.low == pytest.approx(0.25, abs=1e-12)
    assert gap.high == pytest.approx(0.25, abs=1e-12)


def test_the_gap_by_hand():
    """Two prompts, one image each: the proxy wins both, of the others one wins one, one none."""
    bootstrap = PromptBootstrap(2, resamples=4000)
    proxy = bootstrap.mean(np.array([1.0, 1.0]))
    held_out = [bootstrap.mean(np.array(outcome)) for outcome in ([1.0, 0.0], [0.0, 0.0])]
    gap = hacking_gap(proxy, held_out)
    assert gap.value == 0.75
    # the first prompt twice: 1 - 1/2; the second twice: 1 - 0
    assert set(gap.replicates.tolist()) == {0.5, 0.75, 1.0}
    assert average([Resampled(1.0, np.ones(2)), Resampled(0.0, np.zeros(2))]).value == 0.5


def test_diversity_of_each_prompt_by_hand():
    """Orthogonal: 100; equal: 0; opposite: 200; three of which two are equal: 2/3 of 100."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    gone = torch.full((2,), NAN)
    features = torch.stack(
        [
            torch.stack([a, b, gone]),
            torch.stack([a, 3 * a, gone]),
            torch.stack([a, -a, gone]),
            torch.stack([a, a, b]),
            torch.stack([a, gone, gone]),
        ]
    )
    np.testing.assert_allclose(
        group_diversity(features), [100.0, 0.0, 200.0, 200.0 / 3, NAN], atol=1e-6
    )
