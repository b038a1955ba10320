"""The controller of the gated share (its 40 recorded epochs are in test_kernels_golden)."""

from __future__ import annotations

import json
import math

import pytest
import torch

import gardo_kernels as gk


def test_grows_above_the_window_shrinks_below_and_stays_within():
    controller = gk.AdaptiveFraction()
    assert controller.update(1.0) == 0.1  # nothing to compare with
    assert controller.update(1.0) == 0.1  # neither above nor below
    assert controller.update(2.0) == pytest.approx(0.11)
    assert controller.update(1.5) == pytest.approx(0.11)
    assert controller.update(torch.tensor(0.5)) == pytest.approx(0.099)
    for value in range(3, 30):
        fraction = controller.update(float(value))
    assert fraction == controller.fraction == 0.2
    for value in range(40):
        fraction = controller.update(-float(value))
    assert fraction == 0.02


def test_the_window_forgets():
    controller = gk.AdaptiveFraction(window=2)
    for value in (9.0, 1.0, 1.0):
        controller.update(value)
    assert controller.fraction == pytest.approx(0.09)
    assert controller.update(5.0) == pytest.approx(0.099)  # above the last two, not above 9


def test_the_papers_rule_waits_for_the_window_and_has_no_bounds_but_one():
    controller = gk.AdaptiveFraction(0.1, rule="paper")
    assert controller.rule == "paper"
    for value in range(20):
        assert controller.update(float(value)) == 0.1
    assert controller.update(20.0) == pytest.approx(0.11)
    assert controller.update(20.0) == pytest.approx(0.11)  # not above the maximum
    assert controller.update(0.0) == pytest.approx(0.099)
    for value in range(21, 60):
        fraction = controller.update(float(value))
    assert fraction == 1
    for value in range(90):
        fraction = controller.update(-1.0 - value)
    assert fraction == pytest.approx(0.9**90)


def test_the_papers_rule_keeps_bounds_that_are_given():
    controller = gk.AdaptiveFraction(0.1, low=0.09, high=0.105, window=1, rule="paper")
    assert [controller.update(x) for x in (0.0, 1.0, 0.5, 0.4)] == pytest.approx(
        [0.1, 0.105, 0.0945, 0.09]
    )


def test_state_survives_json():
    a, b = gk.AdaptiveFraction(), gk.AdaptiveFraction()
    for value in (0.3, 0.5, 0.2, 0.4):
        a.update(value)
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    for value in (0.6, 0.1, 0.7):
        assert a.update(value) == b.update(value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gk.AdaptiveFraction(initial=0.5), ValueError, "initial"),
        (lambda: gk.AdaptiveFraction(rule="ours"), ValueError, "rule: expected one of official"),
        (lambda: gk.AdaptiveFraction(low=-0.1), ValueError, "low"),
        (lambda: gk.AdaptiveFraction(low=0.3), ValueError, "high"),
        (lambda: gk.AdaptiveFraction(window=0), ValueError, "window"),
        (lambda: gk.AdaptiveFraction(window=1.5), TypeError, "window"),
        (lambda: gk.AdaptiveFraction().update(math.nan), ValueError, "mean_uncertainty"),
        (lambda: gk.AdaptiveFraction().load_state_dict({"x": 1}), ValueError, "state"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
