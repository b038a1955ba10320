import pytest
import yaml

from gardo.run.metrics import MetricsWriter
from gardo.run.report import load_run
from gardo.run.report.facts import facts, method, switches
from gardo.run.report.load import Series, flatten, reward_names
from gardo.run.report.tables import (
    change,
    comparison,
    forwards,
    number,
    scorers,
    spark,
    summary,
    timings,
)
from tests.run.synthetic_run import make_run

DASH = "–"


def test_one_epoch_shows_no_change(tmp_path):
    run = load_run(make_run(tmp_path / "run", epochs=1))
    row = summary(run)[0].rows[0]
    assert (row.first, row.last, row.change, row.spark) == ("0.5500", DASH, DASH, "")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, DASH), (float("nan"), DASH), (float("inf"), DASH), (0.0, "0"), (3, "3"),
     (0.123456, "0.1235"), (5.4321, "5.432"), (54.321, "54.32"), (-1234.56, "-1235"),
     (3e-4, "3.00e-04"), (0.001, "0.0010"), (2.5e7, "2.50e+07")],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [(0.5, 0.75, "+0.2500 (+50\u202f%)"), (0.5, 0.25, "−0.2500 (−50\u202f%)"), (0.0, 2.0, "+2"),
     (-0.5, -0.25, "+0.2500 (+50\u202f%)"), (0.5, 0.5, "0"), (None, 1.0, DASH),
     (1.0, float("nan"), DASH), (100.0, 100.02, "+0.0200"),
     (100.0, 99.5, "−0.5000 (−0.5\u202f%)")],
)  # fmt: skip
def test_changes(first, last, text):
    assert change(first, last) == text


def test_sparkline_by_hand():
    assert spark(Series([0, 5, 10], [1.0, 3.0, 2.0])) == "2.0,22.0 50.0,2.0 98.0,12.0"
    assert spark(Series([0, 1], [4.0, 4.0])) == "2.0,12.0 98.0,12.0"
    assert spark(Series([0], [4.0])) == ""


def run_with(tmp_path, rows, config=None):
    with MetricsWriter(tmp_path / "run" / "metrics.jsonl") as writer:
        for epoch, row in enumerate(rows):
            writer.write({"epoch": epoch, **row})
    if config is not None:
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return load_run(tmp_path / "run")


def test_rows_saved_by_the_gate_by_hand(tmp_path):
    # 64 rows at a share of 0.1 and 32 at 0.05 say 640 for all; the epoch without a gated sample
    # sent none and would have sent as many: 3 * 640 = 1920, of which 96 were sent.
    run = run_with(tmp_path, [
        {"forwards/policy": 1000, "forwards/reference": 64, "gate/share": 0.1},
        {"forwards/policy": 1000, "forwards/reference": 0, "gate/share": 0.0},
        {"forwards/policy": 1000, "forwards/reference": 32, "gate/share": 0.05},
    ])  # fmt: skip
    result = forwards(run)
    assert (result.policy, result.reference, result.ungated) == ("3\u2009000", "96", "1\u2009920")
    assert result.saved == "95%"
    assert "gate share" in result.source


def test_rows_without_the_gate_are_read_where_they_were_logged(tmp_path):
    run = run_with(tmp_path, [{"forwards/reference": 10, "forwards/reference_ungated": 40,
                               "gate/share": 0.9}])  # fmt: skip
    result = forwards(run)
    assert (result.policy, result.ungated, result.saved) == (DASH, "40", "75%")


def test_rows_saved_are_not_invented(tmp_path):
    run = run_with(tmp_path, [{"forwards/reference": 0, "gate/share": 0.0}])
    assert (forwards(run).ungated, forwards(run).saved) == (DASH, DASH)


def test_a_value_that_is_null_at_the_end_is_not_replaced_by_an_older_one(tmp_path):
    rows = [{"reward/a/mean": v} for v in (None, 0.25, 0.5, None)]
    run = run_with(tmp_path, rows, {"rewards": {"proxy": "a"}})
    (group,) = summary(run)
    assert (group.first_title, group.last_title) == ("epoch 0", "epoch 3")
    assert (group.rows[0].first, group.rows[0].last, group.rows[0].change) == (DASH, DASH, DASH)
    assert comparison([run]) == [("Training prompts, last epoch", [("a", [(DASH, DASH)])])]


def test_timings_by_hand(tmp_path):
    rows = [
        {"time/update": 3.0, "time/rollout": 1.0, "time/epoch": 5.0},
        {"time/update": 1.0, "time/rollout": 1.0, "time/epoch": 3.0},
    ]
    run = run_with(tmp_path, rows)
    assert [(t.stage, t.seconds, t.per_epoch, t.percent) for t in timings(run)] == [
        ("rollout", "2.0 s", "1.00 s", 25.0),
        ("update", "4.0 s", "2.00 s", 50.0),
        ("other", "2.0 s", "1.00 s", 25.0),
    ]


def test_evaluations_outside_the_epochs_count(tmp_path):
    with MetricsWriter(tmp_path / "run" / "evaluation.jsonl") as writer:
        for epoch in (0, 1):
            writer.write({"epoch": epoch, "time/evaluate": 3.0})
    run = run_with(tmp_path, [{"time/update": 4.0, "time/epoch": 4.0}])
    assert [(t.stage, t.percent) for t in timings(run)] == [("update", 40.0), ("evaluate", 60.0)]
    assert run.evaluation_keys() == []


def test_evaluations_tell_metrics_from_what_describes_them(tmp_path):
    row = {
        "epoch": 0,
        "name": "start",
        "images": 8,
        "custom": 5,
        "weights": "ema",
        "reward/a/b/mean": 0.5,
        "reward/a/b/std": 0.1,
        "reward/a/b/missing": 0.25,
        "feature_distance": 7.0,
        "diversity/pairwise": 0.6,
    }
    with MetricsWriter(tmp_path / "run" / "evaluation.jsonl") as writer:
        writer.write(row)
    run = run_with(tmp_path, [], {"evaluation": {"custom": 5, "every": 10, "seed": 1}})
    assert run.evaluation_keys() == ["reward/a/b/mean", "feature_distance", "diversity/pairwise"]
    assert run.evaluation_settings() == {"custom": 5, "seed": 1, "images": 8, "weights": "ema"}
    assert run.notes == ["a/b could not score up to 25.0% of the samples of an epoch."]


def test_timings_without_any_time(tmp_path):
    assert timings(run_with(tmp_path, [{"kl": 1.0}])) == []


@pytest.mark.parametrize(
    ("algorithm", "text"),
    [({"name": "grpo", "kl_coef": 0.0, "gate": {"mode": "paper"}}, "GRPO + no KL penalty"),
     ({"name": "grpo", "kl_coef": 0.1, "gate": {"mode": "off"}}, "GRPO + no KL penalty"),
     ({"name": "grpo", "kl_coef": 0.1, "gate": {"mode": "all"},
       "reference": {"kl_threshold": 0, "reset_every": 0}, "advantage_norm": "group_std"},
      "GRPO + KL penalty on every sample + advantage divided by group_std"),
     ({"name": "nft", "kl_coef": 0.1, "gate": {"mode": "official"}, "diversity": True},
      "DiffusionNFT + gated KL (official) + diversity-aware advantage"),
     ({}, "")],
)  # fmt: skip
def test_method_in_words(tmp_path, algorithm, text):
    assert method(run_with(tmp_path, [{}], {"algorithm": algorithm})) == text


def test_a_threshold_of_zero_means_never(tmp_path):
    run = run_with(tmp_path, [{}], {"algorithm": {"reference": {"kl_threshold": 0.0,
                                                                "reset_every": 5}}})  # fmt: skip
    assert switches(run) == [("reference reset at KL", "never"), ("reference reset every", "5")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "1970-01-01 00:00 UTC"),
        ("2026-01-05T10:00:09.5+00:00", "2026-01-05 10:00 UTC"),
        ("2026-01-05 10:00", "2026-01-05 10:00"),
        ("noon", "noon"),
        (None, DASH),
    ],
)
def test_dates_as_numbers_or_text(tmp_path, value, text):
    run = run_with(tmp_path, [{}])
    run.summary["started"] = value
    assert dict(facts(run))["Started"] == text


def test_guidance_of_the_evaluation_may_be_that_of_sampling(tmp_path):
    run = run_with(tmp_path, [{}], {"sampling": {"guidance_scale": 4.5},
                                    "evaluation": {"guidance_scale": None, "seed": 3}})  # fmt: skip
    assert run.evaluation_settings() == {"guidance_scale": 4.5, "seed": 3}


def test_config_helpers():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": {}}) == {"a.b.c": 1, "a.d": [2], "e": {}}
    assert reward_names(["a", {"name": "b", "weight": 2}, {"c": 0.5}]) == ["a", "b", "c"]
    assert reward_names(None) == []


def test_a_single_run_has_no_comparison_of_missing_metrics(tmp_path):
    run = run_with(tmp_path, [{"reward/a/mean": 1.0}, {"reward/a/mean": 3.0}])
    assert comparison([run]) == [
        ("Training prompts, last epoch", [("a", [("3", "+2 (+200\u202f%)")])])
    ]


def test_how_each_reward_scored_in_the_last_epoch(tmp_path):
    run = run_with(
        tmp_path,
        [
            {"reward/a/mean": 1.0, "reward/a/std": 0.5, "time/reward/a": 9.0},
            {"reward/a/mean": 2.0, "reward/a/std": 0.25, "reward/a/missing": 0.125,
             "time/reward/a": 0.0123, "reward/b/mean": None, "reward/b/missing": 1.0},
        ],
        {"rewards": {"proxy": "a", "aux": ["b"], "eval": ["c"]}},
    )  # fmt: skip
    run.evaluations = [{"epoch": 0, "reward/c/mean": 4.0, "time/reward/c": 2.0}]
    rows = {row.name: row for row in scorers(run)}
    a, b, c = rows["a"], rows["b"], rows["c"]
    assert (a.role, a.mean, a.spread, a.per_image, a.missing) == (
        "proxy", "2", "0.2500", "12.30 ms", "12.5%"
    )  # fmt: skip
    assert (b.role, b.mean, b.missing) == ("auxiliary", DASH, "100.0%")
    assert (c.role, c.mean, c.spread, c.per_image, c.missing) == (
        "held-out", "4", DASH, "2000 ms", DASH
    )  # fmt: skip


def test_times_per_image_are_no_stages(tmp_path):
    run = run_with(tmp_path, [{"time/rollout": 1.0, "time/reward/a": 5.0, "time/epoch": 1.0}])
    assert [t.stage for t in timings(run)] == ["rollout"]
