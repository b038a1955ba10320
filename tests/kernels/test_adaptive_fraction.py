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
