"""Alarms: each at its threshold and not below, told once, kept across a resume."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from gardo.config import load_config
from gardo.run.health import ALARMS, Health, Outcome
from gardo.run.report.load import load_run
from gardo.types import UserError

CALM = {
    "ratio/max_abs_dev": 0.0,
    "ratio/mean_abs_dev": 1e-4,
    "clip_fraction": 0.1,
    "kl": 1e-3,
    "grad_norm": 0.1,
    "reward/a/missing": 0.0,
    "reward/b/missing": 0.0,
    "diversity/nn_distance": 0.25,
    "diversity/image_variance": 0.5,
}
# mean 2, standard deviation 1, one score missing
PROXY = torch.tensor([1.0, 3.0, math.nan, 1.0, 3.0])
BEYOND = [
    # alarm, threshold, metric, at the threshold, just not
    ("ratio", 0.125, "ratio/max_abs_dev", 0.125, 0.1249),
    ("ratio_mean", 0.125, "ratio/mean_abs_dev", 0.125, 0.1249),
    # of four updates three can clip
    ("clip_fraction", 0.5, "clip_fraction", 0.375, 0.3749),
    ("kl", 0.125, "kl", 0.125, 0.1249),
    ("grad_norm", 100.0, "grad_norm", 100.0, 99.9),
    ("reward_drop", 1.5, "proxy", 0.5, 0.501),
    ("reward_rise", 1.5, "proxy", 3.5, 3.499),
    ("missing", 0.0625, "reward/b/missing", 0.0625, 0.0624),
    ("diversity", 0.5, "diversity/nn_distance", 0.125, 0.1251),
    ("image_variance", 0.25, "diversity/image_variance", 0.125, 0.1251),
]


def runtime(scaler=None):
    return SimpleNamespace(
        device=torch.device("cpu"),
        from_main=lambda value: value,
        accelerator=SimpleNamespace(scaler=scaler),
    )


@pytest.fixture
def make():
    def make(said=None, **settings):
        settings = {"train.updates_per_epoch": 4, "health.patience": 1} | {
            f"health.{name}": value for name, value in settings.items()
        }
        config = load_config("tiny", overrides=[(k, str(v)) for k, v in settings.items()])
        health = Health(config, runtime())
        health.attach(health.folder, [].append if said is None else said.append)
        return health

    return make


def observe(health, epoch, metric=None, value=None):
    """An epoch that is calm but for one figure."""
    proxy, metrics = PROXY, dict(CALM)
    if metric == "proxy":
        proxy = PROXY - PROXY.nanmean() + value
    elif metric is not None:
        metrics[metric] = value
    return health.observe(epoch, metrics, torch.stack([proxy, torch.zeros(5)]))


def test_the_table_has_every_alarm_and_every_alarm_a_key():
    assert [row[0] for row in BEYOND] == list(ALARMS)
    keys = load_config("tiny").health.model_dump()
    assert set(ALARMS) == keys.keys() - {"max_skipped_in_a_row", "stop_on", "patience"}


@pytest.mark.parametrize(("alarm", "threshold", "metric", "at", "not_yet"), BEYOND)
def test_an_alarm_sounds_at_its_threshold_and_not_below(
    make, alarm, threshold, metric, at, not_yet
):
    said = []
    health = make(said, **{alarm: threshold, "stop_on": alarm})
    assert observe(health, 0)["alarms"] == []
    assert observe(health, 1, metric, not_yet)["alarms"] == []
    health.stop_if_alarmed()
    assert said == []
    told = observe(health, 2, metric, at)
    assert told["alarms"] == [alarm]
    assert told["health/alarms"] == 1
    (line,) = said
    side = "below" if ALARMS[alarm].below else "above"
    assert line.startswith(f"epoch 2: alarm {alarm}: {ALARMS[alarm].figure} is ")
    assert f"at or {side} health.{alarm} {threshold:g}: {ALARMS[alarm].advice}" in line
    with pytest.raises(UserError, match=f"stopped by health.stop_on: alarm {alarm}: "):
        health.stop_if_alarmed()


@pytest.mark.parametrize(("alarm", "threshold", "metric", "at", "not_yet"), BEYOND)
def test_null_switches_an_alarm_off_and_without_stop_on_it_only_warns(
    make, alarm, threshold, metric, at, not_yet
):
    off, warning = make(**{alarm: "null"}), make(**{alarm: threshold})
    for health, alarms in ((off, []), (warning, [alarm])):
        observe(health, 0)
        assert observe(health, 1, metric, at)["alarms"] == alarms
        health.stop_if_alarmed()


def test_an_alarm_is_told_when_it_begins_and_when_it_is_over(make):
    said = []
    health = make(said, kl=0.125, patience=2, stop_on="kl")
    kls = [0.2, 0.1, 0.2, 0.2, 0.2, 0.1, 0.2, 0.2]
    sounding = []
    for epoch, kl in enumerate(kls):
        sounding.append(observe(health, epoch, "kl", kl)["alarms"] == ["kl"])
        if sounding[-1]:
            with pytest.raises(UserError):  # as long as it lasts
                health.stop_if_alarmed()
        else:
            health.stop_if_alarmed()
    assert sounding == [False, False, False, True, True, False, False, True]
    assert [line.split(":")[0] + line.split(":")[1] for line in said] == [
        *("epoch 3 alarm kl", "epoch 5 alarm kl is over", "epoch 7 alarm kl"),
    ]


def test_what_was_not_measured_is_no_alarm(make):
    health = make(diversity=0.9)
    for epoch in range(2):
        metrics = {"kl": math.nan, "grad_norm": math.inf, "loss/total": 1.0}
        missing = torch.full((1, 3), math.nan)
        assert health.observe(epoch, metrics, missing)["alarms"] == []
    # rewards that do not differ give no unit for a rise
    health = make(reward_rise=0.5)
    health.observe(0, CALM, torch.ones(1, 4))
    assert health.observe(1, CALM, torch.full((1, 4), 9.0))["alarms"] == []


def test_the_state_goes_through_json_and_keeps_the_level_and_the_counts(make):
    settings = {"kl": 0.125, "patience": 3, "diversity": 0.5, "max_skipped_in_a_row": 3}
    whole, first = make(**settings), make(**settings)
    for health in (whole, first):
        observe(health, 0)
        observe(health, 1, "kl", 0.2)
        observe(health, 2, "kl", 0.2)
        assert not health.count(Outcome.BAD_LOSS, 2, 0)
        assert not health.count(Outcome.BAD_GRADIENT, 2, 1)
    said = []
    resumed = make(said, **settings)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.state_dict() == first.state_dict()
    assert observe(resumed, 3, "kl", 0.2)["alarms"] == ["kl"]
    # measured by the first epoch of all, not the first since the resume
    for epoch in (4, 5):
        assert observe(resumed, epoch, "diversity/nn_distance", 0.1)["alarms"] == []
    assert observe(resumed, 6, "diversity/nn_distance", 0.1)["alarms"] == ["diversity"]
    assert resumed.count(Outcome.BAD_LOSS, 3, 0)
    with pytest.raises(KeyError):
        resumed.load_state_dict({"base": {}, "reached": {}})


def test_updates_are_counted_by_epoch_and_in_a_row(make):
    said = []
    health = make(said, max_skipped_in_a_row=3)
    left_out = [Outcome.BAD_LOSS, Outcome.BAD_GRADIENT, Outcome.MADE, Outcome.BAD_LOSS]
    assert [health.count(outcome, 0, i) for i, outcome in enumerate(left_out)] == [False] * 4
    told = observe(health, 0)
    assert (told["health/skipped_updates"], told["health/skipped_in_a_row"]) == (3, 1)
    assert "health/scaled_down" not in told
    assert observe(health, 1)["health/skipped_updates"] == 0
    assert said == [
        "epoch 0, update 0: left out: a loss that is not finite (1 in a row, stops at 3)",
        "epoch 0, update 1: left out: a gradient that is not finite (2 in a row, stops at 3)",
        "epoch 0, update 3: left out: a loss that is not finite (1 in a row, stops at 3)",
    ]
    assert not health.count(Outcome.BAD_LOSS, 2, 0)
    assert health.count(Outcome.BAD_LOSS, 2, 1)


def test_the_report_tells_of_alarms_and_of_updates_left_out(tmp_path):
    sounding = [[], ["kl"], ["kl", "diversity"], [], ["kl"], []]
    skipped = [0, 2, 1, 0, 1, 0]
    lines = [
        json.dumps({"epoch": e, "alarms": alarms, "health/skipped_updates": n})
        for e, (alarms, n) in enumerate(zip(sounding, skipped, strict=True))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert load_run(tmp_path).notes == [
        "Updates left out, because a loss or gradient was not finite: 4 (epochs 1-2, 4).",
        "Alarm kl in epochs 1-2, 4.",
        "Alarm diversity in epochs 2.",
    ]
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "\n")
    assert load_run(tmp_path).notes == []
